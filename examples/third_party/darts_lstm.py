"""darts: its LSTM on series with a weekly and a slow period."""

import pytorch_lightning as L
from common import QUIET, main, make_series
from darts import TimeSeries
from darts.models import BlockRNNModel


def train(callbacks, seed):
    series = [TimeSeries.from_values(values) for values in make_series(20, 300)]
    model = BlockRNNModel(
        model="LSTM",
        input_chunk_length=56,
        output_chunk_length=14,
        n_epochs=3,
        random_state=seed,
        pl_trainer_kwargs={"callbacks": callbacks, **QUIET},
    )
    model.fit([one[:-70] for one in series], val_series=[one[-70:] for one in series])
    return model.trainer.callback_metrics["val_loss"]


if __name__ == "__main__":
    main(train, L.Callback)
