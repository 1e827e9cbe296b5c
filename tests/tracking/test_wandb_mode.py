"""Which mode of wandb is used, by recipe, environment and network; and which records its server lacks."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.runs.run_dir import RunDir
from launcher.system.files import read_jsonl
from launcher.tracking.wandb_folder import UNSYNCED, mark_synced, sync_command, unsynced
from launcher.tracking.wandb_mode import resolve_mode
from tests.tracking.hand_made import ENDED_S, KEY, make_run


def test_auto_without_a_key_is_off_and_says_why():
    mode, reason = resolve_mode("auto")
    assert mode == "disabled"
    assert "no API key" in reason
    assert "\n" not in reason


@pytest.mark.parametrize("asked", ["auto", "online"])
def test_a_key_and_no_server_is_offline_and_says_why(monkeypatch, nobody, asked):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", nobody)
    mode, reason = resolve_mode(asked)
    assert mode == "offline"
    assert f"{nobody.removeprefix('http://')} cannot be reached" in reason
    assert "\n" not in reason


def test_auto_with_a_key_and_a_server_is_online(monkeypatch, server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert resolve_mode("auto") == ("online", None)


def test_auto_finds_the_key_in_netrc_for_its_own_server_only(monkeypatch, home, server):
    monkeypatch.setenv("WANDB_BASE_URL", server)
    (home / ".netrc").write_text(f"machine elsewhere.example login user password {KEY}\n")
    assert resolve_mode("auto")[0] == "disabled"
    (home / ".netrc").write_text(f"machine {server.removeprefix('http://')} login user password {KEY}\n")
    assert resolve_mode("auto") == ("online", None)


def test_auto_finds_the_server_that_wandb_login_stored(monkeypatch, home, server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (home / ".config/wandb").mkdir(parents=True)
    (home / ".config/wandb/settings").write_text(f"[default]\nbase_url = {server}\n")
    assert resolve_mode("auto") == ("online", None)


def test_auto_asks_the_proxy_where_there_is_one(monkeypatch, server, nobody):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    monkeypatch.setenv("https_proxy", server)
    assert resolve_mode("auto") == ("online", None)
    monkeypatch.setenv("https_proxy", nobody)
    assert resolve_mode("auto")[0] == "offline"


def test_online_without_a_key_is_offline_and_says_why():
    mode, reason = resolve_mode("online")
    assert mode == "offline"
    assert "no API key" in reason


@pytest.mark.parametrize(("asked", "mode"), [("auto", "disabled"), ("online", "offline")])
def test_a_netrc_file_that_cannot_be_read_is_no_key_and_its_text_is_not_shown(home, asked, mode):
    (home / ".netrc").write_text(f"machine here login user password\n{KEY} {KEY}\n")
    found, reason = resolve_mode(asked)
    assert found == mode
    assert "the netrc file cannot be read, near line" in reason
    assert KEY not in reason


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_offline_and_disabled_need_nothing(mode):
    assert resolve_mode(mode) == (mode, None)


@pytest.mark.parametrize(("value", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")])
def test_wandb_mode_decides_for_auto_alone(monkeypatch, value, mode):
    monkeypatch.setenv("WANDB_MODE", value)
    assert resolve_mode("auto") == (mode, None)
    assert resolve_mode("online")[0] == "offline"  # there is no key
    assert "no API key" in resolve_mode("online")[1]


def test_an_unknown_wandb_mode_is_off_and_says_why(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "shared")
    mode, reason = resolve_mode("auto")
    assert mode == "disabled"
    assert "WANDB_MODE is shared" in reason


# --- which records the server lacks


def unsynced_in(run: RunDir) -> list[Path]:
    return unsynced(run, read_jsonl(run.events))


def test_what_is_not_sent_is_known_from_the_folder_and_from_events(tmp_path):
    run = RunDir(tmp_path / "a run")
    run.create()
    for name in ("offline-run-3-a", "offline-run-1-a", "run-2-a", "run-0-a", "offline-run-4-a"):
        (run.wandb / name).mkdir(parents=True)
        (run.wandb / name / "run-a.wandb").touch()
    (run.wandb / "offline-run-5-a").mkdir()  # nothing in it
    (run.wandb / "latest-run").symlink_to("offline-run-3-a")
    run.append_event(UNSYNCED, folder="run-2-a", reason="given up")
    run.append_event(UNSYNCED, folder="offline-run-1-a", reason="no network")
    run.append_event(UNSYNCED, folder="run-9-a", reason="gone since")
    (run.wandb / "offline-run-4-a/run-a.wandb.synced").touch()
    assert [folder.name for folder in unsynced_in(run)] == ["offline-run-1-a", "run-2-a", "offline-run-3-a"]
    first, second, _ = unsynced_in(run)
    assert sync_command([first]) == f"wandb sync '{first}'"
    assert sync_command([first, second]) == f"wandb sync --include-online '{first}' '{second}'"
    (run.wandb / "run-2-a/run-a.wandb.synced").touch()
    assert [folder.name for folder in unsynced_in(run)] == ["offline-run-1-a", "offline-run-3-a"]
    mark_synced(run)  # a tracker has sent all of it meanwhile
    assert unsynced_in(run) == []


@pytest.mark.slow
def test_wandb_itself_finds_what_the_command_names(tmp_path):
    run = make_run(tmp_path, "offline")
    for name in ("offline-run-20260101_000000-a", "run-20260101_000001-a"):
        (run.wandb / name).mkdir(parents=True)
        (run.wandb / name / "run-a.wandb").touch()
    run.append_event(UNSYNCED, folder="run-20260101_000001-a", reason="given up")
    command = [*shlex.split(sync_command(unsynced_in(run))), "--dry-run"]
    wandb = str(Path(sys.executable).with_name("wandb"))
    done = subprocess.run([wandb, *command[1:]], capture_output=True, text=True, check=False, timeout=ENDED_S)
    assert done.returncode == 0, done.stderr
    assert "Would sync 2 run(s)" in done.stdout + done.stderr
