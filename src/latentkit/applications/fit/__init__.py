"""From a folder of pictures to a model: look, plan, train both stages, report. `fit` is the door."""

from latentkit.applications.fit.folder import Fitted, fit

__all__ = ["Fitted", "fit"]
