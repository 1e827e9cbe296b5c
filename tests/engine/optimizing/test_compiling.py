"""`train.compile` with the real compiler: the same training, names and resume; and without one."""

from __future__ import annotations

import pytest
import torch

from launcher.engine.device import Device
from launcher.engine.optimizing import compiling
from tests.nets import NET


@pytest.fixture
def train(engine, one_rank):
    """Train a run, its network compiled as in a new process; return what came out and what was told."""

    def run(made, *, stop=engine.never, dropout=True):
        told = []

        def prepare(parts):
            if not dropout:
                engine.without_dropout(parts)
            assert compiling.compile_network(parts.model.module, engine.cpu, told.append) is None

        torch._dynamo.reset()
        return engine.train(made, stop=stop, prepare=prepare), told

    yield run
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_network_is_trained_to_the_same_weights(make_run, engine, train):
    plain = engine.train(make_run("plain", model=NET), prepare=engine.without_dropout)
    compiled, told = train(make_run("compiled", model=NET), dropout=False)
    assert len(told) > 2  # training and validation, each for two sizes of batches
    assert all(line.startswith("train.compile: compiled in ") for line in told)
    assert engine.largest_difference(compiled.state, plain.state) < 1e-4  # by the same names


@pytest.mark.slow
def test_a_compiled_run_is_resumed_to_the_same_bits(make_run, engine, train):
    whole, _ = train(make_run("whole", model=NET, train={"epochs": 2}))
    part = make_run("part", model=NET, train={"epochs": 2})
    stopped, _ = train(part, stop=engine.at_poll(5))
    assert stopped.outcome == "preempted"
    assert 0 < stopped.step < whole.step
    resumed, _ = train(part)
    assert engine.identical(resumed.state, whole.state)


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
