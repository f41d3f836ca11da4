"""What goes to the hub and comes from it; the hub itself is a directory here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import lorica
import models
from lorica.errors import CheckpointError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository, kept in a directory."""
    repository = tmp_path / "hub"
    calls: list[tuple[str, dict]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
            calls.append(("create_repo", {"repo_id": repo_id, **options}))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: object) -> str:
            calls.append(("upload_folder", {"repo_id": repo_id, **options}))
            shutil.copytree(folder_path, repository)
            return "commit"

    def download(repo_id: str, filename: str, *, subfolder: str | None = None, **options: object) -> str:
        path = repository / (subfolder or "") / filename
        if not path.exists():
            raise FileNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


def test_an_adapter_goes_to_the_hub_and_comes_back(hub):
    config = lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False)
    model = lorica.get_peft_model(models.mlp(), config)
    assert model.push_to_hub("someone/adapter", private=True, token="secret", commit_message="new") == "commit"
    assert hub[0] == ("token", {"token": "secret"})
    assert hub[1] == ("create_repo", {"repo_id": "someone/adapter", "private": True, "exist_ok": True})
    assert hub[2] == ("upload_folder", {"repo_id": "someone/adapter", "commit_message": "new"})
    back = lorica.PeftModel.from_pretrained(models.mlp(), "someone/adapter")
    assert back.peft_config["default"].target_modules == {"lin0"}
    factors = lorica.get_peft_model_state_dict(back)
    for name, tensor in lorica.get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, factors[name])


def test_what_the_hub_does_not_have_is_named(hub):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*someone/nothing"):
        lorica.PeftModel.from_pretrained(models.mlp(), "someone/nothing")


def test_a_path_that_is_no_repository_does_not_ask_the_hub(tmp_path):
    with pytest.raises(CheckpointError, match="Can't find"):
        lorica.PeftModel.from_pretrained(models.mlp(), str(Path(tmp_path, "a", "b", "c")))
