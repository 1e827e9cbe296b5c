from launcher.system import log_cap
from launcher.system.log_cap import HEAD_BYTES, MAX_BYTES, TAIL_BYTES, LogCap, cut


def test_a_long_log_keeps_its_beginning_and_end_and_the_rank_goes_on_after_them(tmp_path):
    log = tmp_path / "rank-0.log"
    with log.open("ab", buffering=0) as rank:
        rank.write(b"the first failure\n" + b"again and again\n" * (MAX_BYTES // 16) + b"the last words\n")
        cut(log)
        rank.write(b"and more\n")
    lines = log.read_bytes().splitlines()
    assert lines[0] == b"the first failure"
    note = b"--- 47 MB were cut out here: a log has at most 64 MB ---"
    assert set(lines[1:]) == {b"again and again", b"", note, b"the last words", b"and more"}
    assert lines[-2:] == [b"the last words", b"and more"]
    assert log.stat().st_size < HEAD_BYTES + TAIL_BYTES + 1000


def test_a_log_of_the_usual_size_is_left_alone(tmp_path):
    log = tmp_path / "rank-0.log"
    log.write_bytes(b"x" * 1000)
    cut(log)
    assert log.read_bytes() == b"x" * 1000


def test_while_a_run_goes_on_its_logs_are_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(log_cap, "POLL_S", 0.01)
    log = tmp_path / "rank-1.log"
    with LogCap(lambda: [log]):
        for _ in range(20):
            with log.open("ab") as file:
                file.write(b"Traceback\n" * (1 << 20))
            for _ in range(6000):
                if log.stat().st_size <= MAX_BYTES:
                    break
                log_cap.threading.Event().wait(0.01)
            assert log.stat().st_size <= MAX_BYTES
