"""`train.compile` with the real compiler: the same training, names and resume; and without one."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from launcher.engine.device import Device
from launcher.engine.optimizing import compiling
from tests.nets import NET


def apart(function, folder):
    """What a function gives in a forked process: after compiling, a process cannot fork others that train."""
    process = multiprocessing.get_context("fork").Process(target=lambda: torch.save(function(), folder / "given.pt"))
    process.start()
    process.join(540)  # far more than it takes
    assert process.exitcode == 0
    return torch.load(folder / "given.pt", weights_only=False)


@pytest.mark.slow
def test_a_compiled_network_has_the_same_weights_and_is_resumed_to_the_same_bits(make_run, engine, tmp_path):
    def train(made, *, stop=engine.never, dropout=True, compiled=True):
        told = []

        def prepare(parts):
            if not dropout:
                engine.without_dropout(parts)
            if compiled:
                assert compiling.compile_network(parts.model.module, engine.cpu, told.append) is None

        torch._dynamo.reset()  # as in a new process
        done = engine.train(made, stop=stop, prepare=prepare)
        return {"state": done.state, "step": done.step, "outcome": done.outcome, "told": told}

    def all_of_them():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        part = make_run("part", model=NET, train={"epochs": 2})
        return {
            "plain": train(make_run("plain", model=NET), dropout=False, compiled=False),
            "compiled": train(make_run("compiled", model=NET), dropout=False),
            "whole": train(make_run("whole", model=NET, train={"epochs": 2})),
            "stopped": train(part, stop=engine.at_poll(5)),
            "resumed": train(part),
        }

    found = apart(all_of_them, tmp_path)
    told = found["compiled"]["told"]
    assert len(told) > 2  # training and validation, each for two sizes of batches
    assert all(line.startswith("train.compile: compiled in ") for line in told)
    assert engine.largest_difference(found["compiled"]["state"], found["plain"]["state"]) < 1e-4  # by the same names
    assert found["stopped"]["outcome"] == "preempted"
    assert 0 < found["stopped"]["step"] < found["whole"]["step"]
    assert engine.identical(found["resumed"]["state"], found["whole"]["state"])


def test_without_a_compiler_it_is_said_and_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    module = torch.nn.Linear(2, 1)
    problem = compiling.compile_network(module, Device(type="cpu"), print)
    assert problem == "there is no C++ compiler (g++, clang++, or what CXX names)"
    assert module._compiled_call_impl is None


def test_on_cuda_it_takes_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    problem = compiling.compile_network(torch.nn.Linear(2, 1), Device(type="cuda"), print)
    assert problem == "triton is not installed"
