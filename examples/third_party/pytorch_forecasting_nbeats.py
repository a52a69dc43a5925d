"""pytorch-forecasting: N-BEATS with its tutorial's settings (Adam 1e-2, weight decay 1e-2) on the package's AR data."""

import lightning.pytorch as L
import torch
from common import main
from pytorch_forecasting import NBeats, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data


def train(callbacks, losses, seed):
    frame = generate_ar_data(seasonality=10.0, timesteps=200, n_series=40, seed=42)
    frame["static"] = "2"
    columns = {"time_idx": "time_idx", "target": "value", "group_ids": ["series"],
               "time_varying_unknown_reals": ["value"], "max_encoder_length": 60, "max_prediction_length": 20}  # fmt: skip
    training = TimeSeriesDataSet(frame[frame.time_idx <= 160], **columns)
    held_out = TimeSeriesDataSet.from_dataset(training, frame, min_prediction_idx=161)
    torch.manual_seed(seed)
    model = NBeats.from_dataset(training, learning_rate=1e-2, weight_decay=1e-2, widths=[32, 128], log_interval=-1,
                                backcast_loss_ratio=0.1)  # fmt: skip
    trainer = L.Trainer(max_steps=300, callbacks=callbacks, accelerator="cpu", logger=False, gradient_clip_val=0.1,
                        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, training.to_dataloader(train=True, batch_size=64, num_workers=0))
    (measured,) = trainer.validate(model, held_out.to_dataloader(train=False, batch_size=256, num_workers=0),
                                   verbose=False)  # fmt: skip
    return measured["val_loss"]


if __name__ == "__main__":
    main(train, L.Callback)
