"""Opens checkpoints as a stranger to this package would, and prints what it saw as JSON.

Run by test_reload_elsewhere.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.modules["fbn_prune"] = None  # type: ignore[assignment]  # whoever imports it fails
torch.set_num_threads(1)
TOKENS = torch.arange(3, 40).view(1, -1)


def load(folder: Path, **more: object) -> PreTrainedModel:
    trust = "auto_map" in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, **more)
    return model.eval()


@torch.no_grad()
def off(model: PreTrainedModel, expected: torch.Tensor) -> float:
    """The largest difference of a logit."""
    return float((model(TOKENS, use_cache=False).logits.float() - expected).abs().max())


def seen(folder: Path) -> dict[str, object]:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = load(folder)
    prompt = AutoTokenizer.from_pretrained(folder)("Once", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    facts: dict[str, object] = {"loaded": off(model, expected["float32"])}
    facts["generated"] = answer.shape[1] - prompt["input_ids"].shape[1]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    facts["tied"] = head.weight is embeddings.weight
    model.save_pretrained(folder / "again")
    facts["saved again"] = off(load(folder / "again"), expected["float32"])
    facts["device_map auto"] = off(load(folder, device_map="auto"), expected["float32"])
    facts["bfloat16"] = off(load(folder, dtype=torch.bfloat16), expected["bfloat16"])
    return facts


if __name__ == "__main__":
    folders = sorted(path.parent for path in Path(sys.argv[1]).glob("*/expected.pt"))
    print(json.dumps({folder.name: seen(folder) for folder in folders}))
