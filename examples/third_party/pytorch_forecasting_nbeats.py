"""pytorch-forecasting: N-BEATS with its tutorial's settings, on the package's autoregressive series."""

import lightning.pytorch as L
from common import QUIET, main
from pytorch_forecasting import NBeats, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data


def train(callbacks, seed):
    frame = generate_ar_data(seasonality=10.0, timesteps=200, n_series=40, seed=42)
    training = TimeSeriesDataSet(
        frame[frame.time_idx <= 160],
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        time_varying_unknown_reals=["value"],
        max_encoder_length=60,
        max_prediction_length=20,
    )
    held_out = TimeSeriesDataSet.from_dataset(training, frame, min_prediction_idx=161)
    model = NBeats.from_dataset(
        training,
        learning_rate=1e-2,
        weight_decay=1e-2,
        widths=[32, 512],
        backcast_loss_ratio=0.1,
        log_interval=-1,
    )
    trainer = L.Trainer(max_steps=300, gradient_clip_val=0.1, callbacks=callbacks, **QUIET)
    trainer.fit(model, training.to_dataloader(train=True, batch_size=64, num_workers=0))
    held_out_batches = held_out.to_dataloader(train=False, batch_size=256, num_workers=0)
    (measured,) = trainer.validate(model, held_out_batches, verbose=False)
    return measured["val_loss"]


if __name__ == "__main__":
    main(train, L.Callback)
