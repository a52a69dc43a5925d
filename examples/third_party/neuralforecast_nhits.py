"""neuralforecast: N-HiTS with its default sizes on series with a weekly and a slow period."""

import pandas as pd
import pytorch_lightning as L
from common import QUIET, main, make_series
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS


def train(callbacks, seed):
    days = pd.date_range("2024-01-01", periods=300)
    frames = [pd.DataFrame({"unique_id": f"{i}", "ds": days, "y": y}) for i, y in enumerate(make_series(40, 300))]
    model = NHITS(
        h=14,
        input_size=56,
        max_steps=300,
        windows_batch_size=128,
        random_seed=seed,
        callbacks=callbacks,
        **QUIET,
    )
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(pd.concat(frames), val_size=28)
    return forecast.models[0].metrics["ptl/val_loss"]


if __name__ == "__main__":
    main(train, L.Callback)
