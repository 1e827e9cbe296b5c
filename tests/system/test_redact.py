from __future__ import annotations

import pytest

from launcher.system.redact import find_secret, redact, redact_all

HEX40 = "0123456789abcdef0123456789abcdef01234567"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
SECRETS = {
    "Hugging Face": "hf_" + "aB3dE" * 7,
    "GitHub": "ghp_" + "a1B2c3" * 6,
    "GitHub token": "github_pat_" + "11ABCDEFG0" * 4,
    "GitLab": "glpat-" + "x1Y2z3-_" * 3,
    "wandb": "wandb_v1_" + "Ab12_" * 10,
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "API key": "sk-proj-" + "Ab12" * 8,
    "Slack": "xoxb-123456789012-abcdefABCDEF",
    "JSON web token": JWT,
    "password in an address": "https://me:hunter2@proxy.example:3128",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r\n-----END OPENSSH PRIVATE KEY-----",
}
ORDINARY = [
    "resnet50-0676ba61.pth",
    "/data/weights/resnet50-0676ba61.pth",
    "~/models/efficientnet_v2_s-dd5fe13b.safetensors",
    f"/data/{HEX40}/photos",
    f"/checkouts/{HEX40}",
    HEX40,
    "sha256:" + HEX40 + HEX40[:24],
    "IMAGENET1K_V2",
    "DEFAULT",
    "torchvision/resnext101_64x4d",
    "sk-learn-digits-and-other-images-2024",
    "task-A1-with-a-long-name-and-a-number-7",
    "hf_mirror/weights.pth",
    "xoxo-cards-of-2024-and-before-that",
    "eyJ.not.a-token",
    "AKIA_birds",
    "class_token",
    "features.[0-4]",
    "cls_token=5",
    "/data/token=validation/split=train",
    "http://user.example:8080/a@b",
    "module load cuda/12.4",
    "source ~/venvs/train/bin/activate",
    "export TOKENIZERS_PARALLELISM=false",
    "export HF_TOKEN=$(cat ~/.hf_token)",
    "export HF_TOKEN=$HF_TOKEN",
    "export WANDB_API_KEY=",
    "GOOGLE_APPLICATION_CREDENTIALS=/home/me/keys/google.json",
    "--container-env=WANDB_API_KEY,HF_TOKEN",
    "ALL,WANDB_API_KEY",
    "a100&ib",
    "",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """None of the secrets of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "MY_TOKEN", "DB_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("value", ORDINARY)
def test_what_is_ordinary_is_no_secret_and_stays_as_it_is(value):
    assert find_secret(value) is None
    assert find_secret(value, "path") is None
    assert redact(value) == value


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items())
@pytest.mark.parametrize("around", ["{}", "/data/runs-{}", "cannot open '{}': no such file", "x={}"])
def test_what_looks_like_a_secret_is_found_anywhere_and_hidden(kind, secret, around):
    text = around.format(secret) if "sk-" not in secret else around.format(secret).replace("runs-", "")
    found = find_secret(text)
    assert kind in found
    assert secret.removeprefix("https://").partition("@")[0] not in redact(text)
    assert "***" in redact(text)
    assert secret not in found


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"api_key={HEX40}", "api_key=***"),
        (f"{{'apiKey': '{HEX40}'}}", "{'apiKey': '***'}"),
        (f"WANDB_API_KEY: {HEX40}", "WANDB_API_KEY: ***"),
        ("export MY_SECRET='correct horse'", "export MY_SECRET='correct horse'"),  # an ordinary word
        ("export MY_SECRET='Tr0ub4dor&3'", "export MY_SECRET='***'"),
        ("env A=1 DB_PASSWORD=Tr0ub4dor3 launch", "env A=1 DB_PASSWORD=*** launch"),
    ],
)
def test_a_value_after_the_name_of_a_secret_is_hidden(text, hidden):
    assert redact(text) == hidden
    assert bool(find_secret(text)) == (hidden != text)


@pytest.mark.parametrize(
    ("name", "value", "is_one"),
    [
        ("WANDB_API_KEY", "odd shape 1!", True),
        ("wandb_api_key", "oddshape-1!", True),
        ("MY_TOKEN", "12345678", True),
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", True),
        ("AWS_SECRET_ACCESS_KEY", "/JalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", True),
        ("DB_PASSWORD", "hunter2", False),  # too short to be looked for in every text
        ("DB_PASSWORD", "resnet50", False),  # as is a word
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json", False),
        ("WANDB_IDENTITY_TOKEN_FILE", "/run/secrets/Token1", False),
        ("TOKENIZERS_PARALLELISM", "false-or-true-1!", False),
        ("KEYBOARD", "some-value-1!", False),
    ],
)
def test_the_value_of_a_variable_whose_name_says_so_is_a_secret(monkeypatch, name, value, is_one):
    text = f"cannot reach https://x/?key={value}&y"
    assert redact(text) == text
    monkeypatch.setenv(name, value)
    assert (value not in redact(text)) == is_one
    assert find_secret(f"/data/{value}") == (f"the value of {name}" if is_one else None)
    assert find_secret(value, name) == (f"the value of {name}" if is_one else None)
    monkeypatch.delenv(name)
    assert find_secret(value, name) == (f"a value of {name}" if is_one else None)  # as in a profile's env


def test_a_secret_that_begins_another_one_leaves_nothing_of_it(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abc-123-x")
    monkeypatch.setenv("DB_PASSWORD", "abc-123-x-and-more")
    assert redact("it is abc-123-x-and-more.") == "it is ***."


def test_nested_values_are_redacted_and_others_stay(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abc-123-x")
    value = {"message": "abc-123-x", "step": 3, "best": True, "none": None, "list": ["abc-123-x", 1.5], "t": ("a",)}
    expected = {"message": "***", "step": 3, "best": True, "none": None, "list": ["***", 1.5], "t": ["a"]}
    assert redact_all(value) == expected
