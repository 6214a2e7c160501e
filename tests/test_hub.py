"""Pushing to and pulling from a hub: a fake one on loopback that fails on request."""

import errno
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from checkpoint_helpers import refusal
from fake_hub import FakeHub, Repo
from huggingface_hub import constants

from nanochat.common import UserError
from nanochat.formats import hub as hub_module
from nanochat.formats.hub import Push, open_push, pull, push
from nanochat.formats.hub_client import check_name
from scripts import export as export_script

WEIGHTS = os.urandom(200_000)
CARD = b"---\nlicense: mit\n---\n# A model\n"
EXPORT = {"config.json": b"{}", "nanochat.json": b"{}", "README.md": CARD, "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    for key in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    huggingface_hub.close_session()
    fake = FakeHub()
    yield fake
    huggingface_hub.close_session()
    fake.close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    write(folder, EXPORT | {".DS_Store": b"hidden", "onnx/model.onnx": b"graph"})
    return folder


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def push_to(hub: FakeHub, folder: Path, name: str = "alice/model", private: bool = False) -> str:
    return push(folder, open_push(name, private, endpoint=hub.url, delay_seconds=0.01), "first export")


def pull_from(hub: FakeHub, base: Path, name: str = "alice/model", revision: str = "main") -> Path:
    return pull(name, base, revision, endpoint=hub.url, delay_seconds=0.01)


# ---------------------------------------------------------------------------------------------------
# Push


def test_a_push_is_one_commit_of_all_files_that_are_not_hidden(hub: FakeHub, export: Path) -> None:
    assert push_to(hub, export) == f"{hub.url}/alice/model"
    repo = hub.repos["alice/model"]
    (_, _, first), (_, message, files) = repo.commits
    assert message == "first export" and set(first) == {".gitattributes"} and not repo.private
    assert files == first | EXPORT | {"onnx/model.onnx": b"graph"}
    assert hub.count("PUT /lfs/") == 1


def test_a_private_repository_stays_private(hub: FakeHub, export: Path, capsys) -> None:
    push_to(hub, export, private=True)
    assert hub.repos["alice/model"].private and "(private)" in capsys.readouterr().out
    push_to(hub, export)  # without the flag an existing one is not published
    assert hub.repos["alice/model"].private
    push_to(hub, export, "alice/open")
    assert "/settings" in refusal(lambda: push_to(hub, export, "alice/open", private=True))


def test_the_next_push_says_what_it_replaces_and_deletes_what_would_be_loaded(hub, export: Path, capsys) -> None:
    graphs = ("onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data")
    old = dict.fromkeys(("modeling_nanochat.py", "curves-base.png", *graphs), b"old")
    write(export, {**old, "my.txt": b"notes"})
    push_to(hub, export)
    for name in (*old, "my.txt"):
        (export / name).unlink()
    (export / "model.safetensors").write_bytes(WEIGHTS[::-1])
    capsys.readouterr()
    push_to(hub, export)
    files = hub.repos["alice/model"].files
    assert files["model.safetensors"] == WEIGHTS[::-1] and files["my.txt"] == b"notes"
    assert not set(old) & set(files)
    assert len(hub.repos["alice/model"].commits) == 3
    said = capsys.readouterr().out
    assert all(name in said for name in ("config.json", "model.safetensors", *old))


def test_the_same_push_again_makes_no_commit(hub: FakeHub, export: Path) -> None:
    push_to(hub, export)
    push_to(hub, export)
    assert len(hub.repos["alice/model"].commits) == 2


def test_files_of_something_else_are_not_touched(hub: FakeHub, export: Path) -> None:
    hub.repos["alice/model"] = Repo()
    hub.repos["alice/model"].add("mine", {"README.md": b"# mine", "pytorch_model.bin": b"weights"})
    assert "alice/model" in refusal(lambda: open_push("alice/model", False, endpoint=hub.url))
    hub.repos["alice/model"].add("emptied", {"README.md": b"# mine"})
    push_to(hub, export)


@pytest.mark.parametrize("name", ["model", "a/b/c", "alice/", "/model", "alice/..", "alice/mo del", "al--ice/x", "é/x"])
def test_names_that_no_model_can_have(hub: FakeHub, name: str) -> None:
    assert "USER/NAME" in refusal(lambda: check_name(name))
    assert "USER/NAME" in refusal(lambda: open_push(name, False, endpoint=hub.url))
    assert not hub.requests


def test_without_a_token_nothing_is_asked(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(lambda: open_push("alice/model", False, endpoint=hub.url))
    assert not hub.requests
    Path(constants.HF_TOKEN_PATH).write_text("hf_alice")  # as `hf auth login` leaves it
    assert open_push("alice/model", False, endpoint=hub.url).commit is None


def test_a_token_that_is_not_good_enough(hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "alice/" in refusal(lambda: push_to(hub, export, "carol/model")) and hub.count("POST") == 0
    push_to(hub, export, "alice-org/model")
    push_to(hub, export)
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert "settings/tokens" in refusal(lambda: push_to(hub, export))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "(401)" in refusal(lambda: push_to(hub, export))
    assert len(hub.repos["alice/model"].commits) == 2


def test_a_commit_of_someone_else_meanwhile_is_not_overwritten(hub: FakeHub, export: Path) -> None:
    push_to(hub, export)
    ready = open_push("alice/model", False, endpoint=hub.url)
    hub.repos["alice/model"].add("edited there", {"README.md": b"# edited"})
    (export / "config.json").write_bytes(b"{ }")
    assert "412" in refusal(lambda: push(export, ready, "second"))
    assert hub.repos["alice/model"].files == {"README.md": b"# edited"}


@pytest.mark.parametrize("where", ["create", "preupload", "batch", "/lfs/", "/commit/"])
@pytest.mark.parametrize("fault", [500, "drop"])
def test_failures_in_between_are_repeated(hub: FakeHub, export: Path, where: str, fault: object) -> None:
    hub.faults[where] = [fault, fault]
    push_to(hub, export)
    repo = hub.repos["alice/model"]
    assert repo.files["model.safetensors"] == WEIGHTS and len(repo.commits) == 2
    assert not hub.faults[where]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: FakeHub, export: Path) -> None:
    hub.faults["lose the answer"] = [1]
    push_to(hub, export)
    assert len(hub.repos["alice/model"].commits) == 2 and hub.count("POST /api/models/alice/model/commit") == 1


def test_a_push_that_is_given_up_publishes_nothing_and_goes_on_later(
    hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_NETWORK_SECONDS", "0.2")
    hub.faults["/commit/"] = [503] * 200
    assert "503" in refusal(lambda: push_to(hub, export))
    assert set(hub.repos["alice/model"].files) == {".gitattributes"}
    hub.faults.clear()
    push_to(hub, export)
    assert hub.repos["alice/model"].files["model.safetensors"] == WEIGHTS
    assert hub.count("PUT /lfs/") == 1  # what had arrived was not sent again


def test_ctrl_c_publishes_nothing(hub: FakeHub, export: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    ready = open_push("alice/model", False, endpoint=hub.url)
    ready.hub.api.preupload_lfs_files = lambda **_: interrupt()
    with pytest.raises(KeyboardInterrupt):
        push(export, ready, "first")
    assert set(hub.repos["alice/model"].files) == {".gitattributes"}


def test_a_hub_that_cannot_be_reached_is_not_waited_for(hub: FakeHub, export: Path) -> None:
    hub.close()
    assert hub.url.rpartition("/")[2] in refusal(lambda: push_to(hub, export))


def test_a_hub_without_xet_gets_lfs(hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push_to(hub, export)
    assert hub.count("xet-write-token") >= 1 and hub.repos["alice/model"].files["model.safetensors"] == WEIGHTS


def test_a_card_that_the_hub_refuses(hub: FakeHub, export: Path) -> None:
    (export / "README.md").write_bytes(b"---\nlicense: [1]\n---\n")
    assert "license" in refusal(lambda: push_to(hub, export))
    assert hub.count("/lfs/") == 0


def test_offline_mode(hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "HF_HUB_OFFLINE" in refusal(lambda: push_to(hub, export))
    assert "HF_HUB_OFFLINE" in refusal(lambda: pull_from(hub, export))


def test_only_exports_are_pushed(hub: FakeHub, tmp_path: Path, export: Path) -> None:
    ready = open_push("alice/model", False, endpoint=hub.url)
    (tmp_path / "home").mkdir()
    assert "config.json" in refusal(lambda: push(tmp_path / "home", ready, "x"))
    (export / "secret.txt").symlink_to(tmp_path / "token")
    assert "secret.txt" in refusal(lambda: push(export, ready, "x"))
    assert hub.count("POST") == 0


def test_export_and_push_from_the_command_line(
    hub: FakeHub, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    out = tmp_path / "out"
    flags = [str(out), "-i", "base", "--push=alice/model", "--private"]
    assert export_script.main(flags) == 0
    repo = hub.repos["alice/model"]
    assert repo.private and {"model.safetensors", "README.md", "nanochat.json"} <= set(repo.files)
    assert f"{hub.url}/alice/model" in capsys.readouterr().out.splitlines()[-1]
    assert b'name = "alice/model"' in repo.files["README.md"]
    (out / "README.md").write_bytes(CARD)
    with pytest.raises(UserError, match="exists"):
        export_script.main(flags)
    assert export_script.main([*flags, "--existing"]) == 0 and repo.files["README.md"] == CARD
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(UserError, match="hf auth login"):  # before anything is written
        export_script.main([str(tmp_path / "other"), *flags[1:]])
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------
# Pull


@pytest.fixture
def model(hub: FakeHub) -> Repo:
    """alice/model, with files that are to be taken and files that are not."""
    repo = hub.repos["alice/model"] = Repo()
    others = {
        "modeling_x.py": b"code",
        "pytorch_model.bin": b"pickle",
        "tokenizer.pkl": b"pickle",
        "a/config.json": b"",
    }
    repo.add("first", EXPORT | others | {"tokenizer.json": b"{}", "chat_template.jinja": b""})
    return repo


TAKEN = {"config.json", "nanochat.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


def test_a_pull_takes_what_can_be_read_and_nothing_else(hub: FakeHub, model: Repo, tmp_path: Path) -> None:
    folder = pull_from(hub, tmp_path)
    assert {p.name for p in folder.iterdir()} == TAKEN
    assert all(not p.is_symlink() and p.read_bytes() == model.files[p.name] for p in folder.iterdir())
    asked = len(hub.requests)
    assert pull_from(hub, tmp_path) == folder and len(hub.requests) == asked + 1  # only which commit is the newest


def test_an_adapter_is_pulled_whole(hub: FakeHub, tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    hub.repos["alice/model"] = Repo()
    hub.repos["alice/model"].add("first", {**files, "README.md": CARD, "training_args.bin": b"pickle"})
    assert {p.name: p.read_bytes() for p in pull_from(hub, tmp_path).iterdir()} == files


def test_a_pull_of_a_revision(hub: FakeHub, model: Repo, tmp_path: Path) -> None:
    first = model.commits[0][0]
    model.add("second", EXPORT | {"config.json": b"{2}"})
    assert (pull_from(hub, tmp_path) / "config.json").read_bytes() == b"{2}"
    assert (pull_from(hub, tmp_path, revision=first) / "config.json").read_bytes() == b"{}"
    assert "alice/model" in refusal(lambda: pull_from(hub, tmp_path, revision="nowhere"))


def test_of_a_published_checkpoint_the_last_step_is_taken(hub: FakeHub, tmp_path: Path) -> None:
    names = ["model_000650.pt", "meta_000650.json", "model_021400.pt", "meta_021400.json", "tokenizer.pkl", "optim.pt"]
    hub.repos["alice/model"] = Repo()
    hub.repos["alice/model"].add("first", {name: name.encode() for name in names})
    assert {p.name for p in pull_from(hub, tmp_path).iterdir()} == {names[2], names[3], "tokenizer.pkl"}
    hub.repos["alice/model"].add("second", {"model.bin": b""})
    assert "safetensors" in refusal(lambda: pull_from(hub, tmp_path))


def test_models_that_are_not_shown(hub: FakeHub, model: Repo, tmp_path: Path, monkeypatch) -> None:
    assert "alice/other" in refusal(lambda: pull_from(hub, tmp_path, "alice/other"))
    model.private = True
    pull_from(hub, tmp_path)  # alice herself
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert "alice/model" in refusal(lambda: pull_from(hub, tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(lambda: pull_from(hub, tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "hf auth login" in refusal(lambda: pull_from(hub, tmp_path))


def test_a_gated_model(hub: FakeHub, model: Repo, tmp_path: Path) -> None:
    model.gated = True
    assert f"{hub.url}/alice/model" in refusal(lambda: pull_from(hub, tmp_path))
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("fault", [500, 429, "drop"])
def test_a_pull_through_failures(hub: FakeHub, model: Repo, tmp_path: Path, fault: object) -> None:
    hub.faults["/api/models"], hub.faults["model.safetensors"] = [fault], [fault, fault]
    hub.faults["cut"] = [1]
    assert (pull_from(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_an_interrupted_pull_is_no_model_and_goes_on(hub: FakeHub, model: Repo, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NANOCHAT_NETWORK_SECONDS", "0")
    hub.faults["model.safetensors"] = [503] * 50
    refusal(lambda: pull_from(hub, tmp_path))
    folder = tmp_path / "pulled" / "alice--model"
    assert not (folder / model.commits[0][0]).exists()
    hub.faults.clear()
    before = hub.count("/config.json")
    assert {p.name for p in pull_from(hub, tmp_path).iterdir()} == TAKEN
    assert hub.count("/config.json") == before  # was complete


def test_a_file_that_is_not_what_the_hub_states(hub: FakeHub, model: Repo, tmp_path: Path) -> None:
    hub.faults["corrupt"] = [1]
    model.commits[0] = (model.commits[0][0], "", {"model.safetensors": WEIGHTS})  # only large files have a hash
    assert "model.safetensors" in refusal(lambda: pull_from(hub, tmp_path))
    assert (pull_from(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("size", ["big", -1, None, 2**70])
def test_sizes_that_no_file_has(size: Any, hub: FakeHub, model: Repo, tmp_path: Path, monkeypatch) -> None:
    info = SimpleNamespace(sha="a" * 40, siblings=[SimpleNamespace(rfilename="a.safetensors", size=size, lfs=None)])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    assert re.search("no size|GB left", refusal(lambda: pull_from(hub, tmp_path)))


def test_an_answer_of_another_form(hub: FakeHub, model: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, **__: object) -> None:
        raise TypeError("argument after ** must be a mapping, not list\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", parse)
    assert "something else than a hub" in refusal(lambda: pull_from(hub, tmp_path))


def test_two_processes_pull_once(hub: FakeHub, model: Repo, tmp_path: Path) -> None:
    threads = [threading.Thread(target=pull_from, args=(hub, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [request for request in hub.requests if request.startswith("GET /alice/model/resolve")]
    assert len(asked) == len(set(asked)) > 0, asked


def test_a_full_disk(hub: FakeHub, model: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "GB" in refusal(lambda: pull_from(hub, tmp_path))


def test_errors_of_this_machine_are_no_errors_of_the_hub(hub: FakeHub, export: Path) -> None:
    ready: Push = open_push("alice/model", False, endpoint=hub.url)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught:
        ready.hub.call(full)
    assert caught.value.errno == errno.ENOSPC
