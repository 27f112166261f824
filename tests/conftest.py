import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture
def generated_latents(monkeypatch):
    """A function (model, **options of generate) -> the latents of every block, (B, block_size, d) each."""
    import cola
    import flow

    def run(model, **options):
        latents = []
        monkeypatch.setattr(cola, "solve", lambda *args: latents.append(flow.solve(*args)) or latents[-1])
        model.generate(**options)
        return latents

    return run


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
