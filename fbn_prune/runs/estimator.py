"""A scikit-learn estimator for the functional networks of a language model (arXiv 2502.20408)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from transformers import PreTrainedModel

from fbn_prune.data.given import Dataset
from fbn_prune.errors import InvalidInput
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.recipe import PruningConfig
from fbn_prune.runs.live import discover_live, time_courses_live


class FunctionalNetworkICA(TransformerMixin, BaseEstimator):
    """Find the functional networks of a model (`fit`) and their time courses on text (`transform`).

    Parameters
    ----------
    n_components
        Number of networks to find.
    random_state
        Seed for the sample of tokens and for the start of the solver.
    network_tokens
        Number of tokens that the ICA runs on.
    scope
        "global": one ICA over the neurons of all layers (arXiv 2502.20408); "layer": one ICA per layer
        (arXiv 2508.05239).
    allow_untrained
        Go on with a model that predicts no better than a guess, such as one with random weights.

    Attributes
    ----------
    networks_
        The fitted :class:`FunctionalNetworks`.
    components_
        Their maps, float32 [networks, neurons of all layers], z-scored.
    mixing_
        Pseudo-inverse of the maps, float64 [neurons of all layers, networks]: standardised activations times this
        are the time courses.
    explained_variance_ratio_
        Share of the variance of the standardised activations that each network explains, float64 [networks].
    n_iter_
        Largest number of FastICA iterations of a layer, or of all layers together.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from fbn_prune import FunctionalNetworkICA
    >>> from fbn_prune.data.builtin import model_path
    >>> model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    >>> tokenizer = AutoTokenizer.from_pretrained(model_path())
    >>> ica = FunctionalNetworkICA(n_components=4, network_tokens=512).fit(model, tokenizer)
    >>> ica.transform(["def f(x): return x"]).shape[1]
    4
    """

    def __init__(
        self,
        n_components: int = 64,
        *,
        random_state: int = 0,
        network_tokens: int = 8192,
        scope: str = "global",
        allow_untrained: bool = False,
    ) -> None:
        self.n_components = n_components
        self.random_state = random_state
        self.network_tokens = network_tokens
        self.scope = scope
        self.allow_untrained = allow_untrained

    def fit(
        self, model: PreTrainedModel, tokenizer: Any, dataset: Dataset = "builtin"
    ) -> FunctionalNetworkICA:
        """Find the networks of a model; the parameters are those of :func:`fbn_prune.prune`.

        Raises
        ------
        InvalidInput
            If the model, the text or a parameter of the estimator cannot be used.
        """
        config = PruningConfig(
            networks=self.n_components,
            network_tokens=self.network_tokens,
            tokens=max(self.network_tokens, self.n_components + 1),
            scope=cast(Literal["global", "layer"], self.scope),  # validated by PruningConfig
            seed=self.random_state,
            report_networks=True,
            keep_networks=1,
            allow_untrained=self.allow_untrained,
        )
        self.networks_ = discover_live(model, tokenizer, dataset, config, StageClock())
        self._model, self._tokenizer = model, tokenizer
        return self

    def fit_transform(
        self, model: PreTrainedModel, tokenizer: Any, dataset: Dataset = "builtin"
    ) -> NDArray[np.float64]:
        """Return :meth:`transform` of the text that the networks were found on, see :meth:`fit`."""
        return self.fit(model, tokenizer, dataset).transform(dataset)

    def transform(
        self, dataset: Dataset, model: PreTrainedModel | None = None, tokenizer: Any = None
    ) -> NDArray[np.float64]:
        """Return the activity of every network at every token.

        Parameters
        ----------
        dataset
            Text in any of the forms that :func:`fbn_prune.prune` accepts; all of it is read.
        model, tokenizer
            A model with the same widths as the fitted one, and its tokenizer. Default: those passed to :meth:`fit`.

        Returns
        -------
        ndarray
            Time courses, float64 [tokens, networks], in the order of the text; includes the special tokens that
            open each block.

        Raises
        ------
        InvalidInput
            If the estimator was loaded from a file and no model is given, or the widths or the text do not fit.
        """
        check_is_fitted(self, "networks_")
        model = model or getattr(self, "_model", None)
        tokenizer = tokenizer or getattr(self, "_tokenizer", None)
        if model is None or tokenizer is None:
            raise InvalidInput("networks from a file: give transform a model and its tokenizer")
        courses: NDArray[np.float64] = time_courses_live(
            model, tokenizer, dataset, self.networks_
        ).numpy()
        return courses

    @property
    def components_(self) -> NDArray[np.float32]:
        maps: NDArray[np.float32] = self.networks_.maps.numpy()
        return maps

    @property
    def mixing_(self) -> NDArray[np.float64]:
        inverse: NDArray[np.float64] = torch.linalg.pinv(self.networks_.maps.double()).numpy()
        return inverse

    @property
    def explained_variance_ratio_(self) -> NDArray[np.float64]:
        shares: NDArray[np.float64] = self.networks_.explained_variance.numpy()
        return shares

    @property
    def n_iter_(self) -> int:
        return max(int(each["ica_iterations"]) for each in self.networks_.header["convergence"])

    def save(self, path: str | Path) -> None:
        """Write the networks in the format of `networks.safetensors`; the model is not saved."""
        check_is_fitted(self, "networks_")
        self.networks_.save(path)

    @classmethod
    def load(cls, path: str | Path) -> FunctionalNetworkICA:
        """Return a fitted estimator from a file that :meth:`save` or `fbn-prune discover` wrote.

        Raises
        ------
        InvalidInput
            If the file does not hold functional networks.
        """
        networks = FunctionalNetworks.load(path)
        header = networks.header
        estimator = cls(
            len(networks.maps),
            random_state=int(header.get("seed", 0)),
            network_tokens=int(header.get("tokens", 8192)),
            scope=str(header.get("scope", "global")),
        )
        estimator.networks_ = networks
        return estimator
