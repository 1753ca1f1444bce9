"""A real server, `transformers serve`, answers for pruned checkpoints of both layouts over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from warm_python import WARM

from fbn_prune.data import builtin
from fbn_prune.export.writer import write_checkpoint
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.surgery import MlpCut

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

WIDTHS = {"uniform": [640] * 6, "ragged": [768, 600, 640, 512, 700, 760]}
FLAGS = {
    "uniform": [],
    "ragged": ["--trust-remote-code", "--continuous-batching", "--cb-num-blocks", "64"],
}
QUESTIONS = ["17+72=", "09+08=", "copy a b c :", "import os\n", "The module "]
START_SECONDS = 240


def pruned(layout: str, folder: Path) -> Path:
    """The embedded model without each layer's last neurons."""
    source = Checkpoint.open(str(builtin.model_path()))
    adapter = ModelAdapter(source.load_model("cpu", torch.float32))
    cuts = [
        MlpCut(torch.arange(width), adapter.down_weight(layer)[:, :width])
        for layer, width in enumerate(WIDTHS[layout])
    ]
    folder.mkdir(parents=True)
    write_checkpoint(source, cuts, folder)
    return folder


def start(folder: Path, cache: Path, port: int, *flags: str) -> subprocess.Popen[str]:
    (cache / "hub").mkdir(parents=True, exist_ok=True)  # without it /v1/models fails
    own = {"HF_HUB_CACHE": str(cache / "hub"), "HF_MODULES_CACHE": str(cache / "modules")}
    return subprocess.Popen(
        [
            *(*WARM, "-m", "transformers.cli.transformers", "serve", str(folder)),
            *("--device", "cpu", "--dtype", "float32", "--port", str(port), *flags),
        ],
        env={**os.environ, **own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=cache,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


@contextmanager
def stopped_at_the_end(server: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        server.kill()
        server.communicate()


def wait_until_it_answers(server: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"the server left: {server.communicate()[1]}")
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the server did not start")


@dataclass
class Served:
    """A served checkpoint, and what transformers itself makes of it."""

    folder: Path
    client: openai.OpenAI

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=True, dtype=torch.float32
        )

    def answer(self, question: str) -> str:
        """What `generate` writes after `question`, the most probable token each time."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        ids = tokenizer(question, return_tensors="pt")
        written = self.model.generate(**ids, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    def complete(self, question: str) -> str:
        made = self.client.completions.create(
            model=str(self.folder), prompt=question, max_tokens=8, temperature=0
        )
        return made.choices[0].text


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """Both checkpoints, served side by side."""
    root = tmp_path_factory.mktemp("serving")
    with ExitStack() as stack:
        started = {}
        for layout, flags in FLAGS.items():
            folder, port = pruned(layout, root / layout / "model"), free_port()
            server = start(folder, root / layout, port, *flags)
            stack.enter_context(stopped_at_the_end(server))
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
            started[layout] = (server, port, Served(folder, client))
        for server, port, _ in started.values():
            wait_until_it_answers(server, port)
        yield {layout: served for layout, (_, _, served) in started.items()}


@pytest.fixture(params=list(WIDTHS))
def served(request: pytest.FixtureRequest, servers: dict[str, Served]) -> Served:
    return servers[request.param]


def test_a_chat_is_answered_also_word_by_word(served: Served) -> None:
    messages = [
        {"role": "user", "content": "09+08="},
        {"role": "assistant", "content": "017"},
        {"role": "user", "content": "17+72="},
    ]
    expected = served.answer("09+08=017\n17+72=")
    asked = {"model": str(served.folder), "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = served.client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    pieces = served.client.chat.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected


def test_completions_at_the_same_time_are_what_transformers_generates(served: Served) -> None:
    questions = QUESTIONS * 2
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(served.complete, questions))
    expected = {question: served.answer(question) for question in QUESTIONS}
    assert answers == [expected[question] for question in questions]


def test_an_answer_ends_at_a_stop_word(servers: dict[str, Served]) -> None:
    served = servers["uniform"]  # continuous batching passes over stop words
    made = served.client.completions.create(
        model=str(served.folder), prompt="17+72=", max_tokens=20, temperature=0, stop=["\n"]
    )
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].text.count("\n") == 1


def test_the_server_lists_its_models_and_refuses_another_folder_by_name(served: Served) -> None:
    assert served.client.models.list().object == "list"
    with pytest.raises(openai.BadRequestError) as refused:
        served.client.completions.create(model="/nowhere/at/all", prompt="17+72=")
    assert "/nowhere/at/all" in refused.value.response.text


def test_a_wrong_folder_is_named_before_anything_is_served(tmp_path: Path) -> None:
    server = start(tmp_path / "no-such-model", tmp_path, free_port())
    _, said = server.communicate(timeout=START_SECONDS)
    assert server.returncode == 1
    assert "no-such-model" in said.strip().splitlines()[-1]
