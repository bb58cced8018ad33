"""The probe against the exact predictors of Gaussian data, whatever their scale."""

from dataclasses import replace
from typing import Any

import family
import pytest
from torch import Tensor

from latentkit.checkpoints.probe import probed_prediction
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser


@pytest.mark.parametrize("deviation", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_exact_predictors_are_told_apart(prediction: str, deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(family.UNET, context_width=None)
    denoiser = Denoiser(config, family.SCHEDULE, "eps")

    def exact(x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        level = float(sigma)
        x0 = deviation**2 / (deviation**2 + level**2) * x
        eps = (x - x0) / level
        return (eps if prediction == "eps" else (eps - level * x0) / (1 + level**2) ** 0.5).float()

    monkeypatch.setattr(denoiser, "network", exact)
    assert probed_prediction(denoiser, Conditioning(), 4) == prediction
