"""Serves a bundle through `transformers serve`: an OpenAI-compatible server whose models are the tasks.

Usage: python examples/serve_tasks.py BUNDLE [--port 8000]     (pip install 'transformers[serving]')

    curl localhost:8000/v1/completions -H 'content-type: application/json' \\
         -d '{"model": "code", "prompt": "def add(", "max_tokens": 20}'

One model is in memory; requests take turns, each through the neurons of the task it names. `whole`
names the model itself.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from transformers import AutoTokenizer
from transformers.cli import serve
from transformers.cli.serving import model_manager

from fbn_prune.serving import Bundle, Served

WHOLE = "whole"


class TaskModel:
    """What the server takes for a model: its `generate` runs through one task's neurons."""

    def __init__(self, served: Served, task: str, turn: threading.Lock) -> None:
        self._served, self._task, self._turn = served, task, turn

    def generate(self, *arguments: Any, **more: Any) -> Any:
        """Generate when it is this request's turn."""
        with self._turn:
            if self._task == WHOLE:
                return self._served.model.generate(*arguments, **more)
            with self._served.networks(self._task):
                return self._served.model.generate(*arguments, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._served.model, name)


def manager_of(bundle: Bundle) -> type[model_manager.ModelManager]:
    """The server's manager of models, which knows no others than the bundle's tasks."""
    served, turn = bundle.serve(), threading.Lock()
    tokenizer = AutoTokenizer.from_pretrained(bundle.base.path)
    models = {name: TaskModel(served, name, turn) for name in (*served.names, WHOLE)}

    class TaskManager(model_manager.ModelManager):
        def load_model_and_processor(self, model: str, *_: Any, **__: Any) -> Any:
            name = model.partition("@")[0]
            if name not in models:
                raise HTTPException(404, f"no task {name!r}; there are {', '.join(models)}")
            return models[name], tokenizer

        def get_model_modality(self, *_: Any, **__: Any) -> Any:
            return model_manager.Modality.LLM

        @staticmethod
        def get_gen_models(*_: Any, **__: Any) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "owned_by": "bundle"} for name in models]

    return TaskManager


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    # transformers makes its manager itself: this is the one place where a loaded model can be handed in.
    model_manager.ModelManager = manager_of(Bundle.open(Path(options.bundle)))  # type: ignore[misc]
    serve.Serve(host=options.host, port=options.port)


if __name__ == "__main__":
    main()
