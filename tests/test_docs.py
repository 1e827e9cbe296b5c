"""The documentation against what it speaks of: links lead somewhere, commands parse, recipe keys exist.

The table of recipe keys in docs/recipes.md is made from recipe.schema.json:
UPDATE_GOLDEN=1 pytest tests/test_docs.py writes it anew.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.recipe import load as recipes
from launcher.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RECIPES = ROOT / "docs" / "recipes.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SCHEMA = json.loads((ROOT / "recipe.schema.json").read_text(encoding="utf-8"))
TABLE = re.compile(r"(?<=<!-- keys: begin -->\n).*?(?=<!-- keys: end -->)", re.DOTALL)
SECTIONS = {key for key, value in SCHEMA["properties"].items() if "$ref" in value}
PROFILE = (ROOT / "slurm/profiles/template.yaml").read_text(encoding="utf-8")
PROFILE_KEYS = set(re.findall(r"^([a-z_]+):", PROFILE, re.MULTILINE))
README_LINES = 120

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES


@every_page
def test_every_relative_link_leads_somewhere(page):
    text = without_code(page.read_text(encoding="utf-8"))
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://", target)]
    assert [target for target in targets if not leads_somewhere(page, target)] == []


@every_page
def test_every_command_parses(page):
    found = commands(page.read_text(encoding="utf-8"))
    assert [(command, problem) for command in found if (problem := find_problem(command))] == []


@every_page
def test_every_recipe_key_named_in_prose_exists(page):
    spans = re.findall(r"`([a-z_.]+)(?::? [^`]*|=[^`]*)?`", split(page.read_text(encoding="utf-8"))[0])
    named = {span for span in spans if span.partition(".")[0] in SECTIONS and "." in span and not span.endswith(".py")}
    known = {*keys(), *(key.rpartition(".")[0] for key in keys())}
    assert named - known == set()


def test_what_other_tools_call_something_else_is_a_recipe(tmp_path, monkeypatch):
    """Each `key: value` of the page is a recipe's, with the files that it names."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_model.py", "my_data.py"):
        (tmp_path / name).write_text("def build(**arguments): ...\n")
    for name in (
        "file.safetensors",
        *(
            f"{folder}/{split}/{name}/a.jpg"
            for folder in ("DIR", "photos")
            for split in ("train", "val")
            for name in "ab"
        ),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = (ROOT / "docs/from-your-script.md").read_text(encoding="utf-8")
    spans = [span for span in re.findall(r"`([^`]+)`", text) if re.match(r"[a-z_.]+: ", span)]
    found = [*spans, *re.findall(r" # ([a-z]+: (?:{.*?}|\w+))", text)]
    assert len(found) > 30
    for values in map(yaml.safe_load, found):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(nested(values)))
        recipes.load("mine.yaml", [] if "path" in str(values) else ["data.name=digits"])


def nested(values):
    """A mapping by dotted keys as a recipe has it."""
    made = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda into, section: into.setdefault(section, {}), sections, made)[name] = value
    return made


def test_the_table_of_recipe_keys_is_that_of_the_schema():
    text = RECIPES.read_text(encoding="utf-8")
    table = "\n" + "\n".join(table_of_keys()) + "\n\n"
    if os.environ.get("UPDATE_GOLDEN"):
        RECIPES.write_text(TABLE.sub(lambda _: table, text), encoding="utf-8")
        text = RECIPES.read_text(encoding="utf-8")
    assert TABLE.findall(text) == [table], "if the schema has changed: UPDATE_GOLDEN=1 pytest tests/test_docs.py"


def test_the_site_builds_and_each_link_on_it_leads_somewhere(tmp_path):
    done = build_site(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = (tmp_path / "site/files/recipes/quickstart.yaml/index.html").read_text(encoding="utf-8")
    assert "resnet18" in recipe, "a file outside of docs/ that a page links to has a page"
    pages = [file.read_text(encoding="utf-8") for file in (tmp_path / "site").rglob("*.html")]
    loaded = {url for page in pages for url in re.findall(r'(?:src|<link[^>]* href)="(https?://[^"]*)"', page)}
    assert loaded == set(), "a page loads nothing from elsewhere"


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    for name in (
        "docs",
        "mkdocs.yml",
        *(page.name for page in PAGES if page.parent == ROOT),
        "recipes",
        "slurm",
        "tests",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "images.md").open("a", encoding="utf-8") as page:
        page.write("[gone](recipes.md#no-such-heading)")
    done = build_site(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "no-such-heading" in done.stdout + done.stderr


def build_site(root, target):
    """`make docs`, into another folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(target)]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )


def split(text):
    """The prose of a page, and the lines of its code blocks, fenced or indented; an indented list is prose."""
    prose, code, fenced, indented, in_list = [], [], False, False, False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
            continue
        in_list = line.startswith("- ") or (in_list and (line.startswith(" ") or not line))
        after_prose = bool(prose and prose[-1]) and not indented
        indented = line.startswith("    ") and not in_list and not after_prose
        (code if fenced or indented else prose).append(line)
    return "\n".join(prose), code


def without_code(text):
    return re.sub(r"`[^`]*`", "", split(text)[0])


def slugs(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", split(page.read_text(encoding="utf-8"))[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(page, target):
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    return file.exists() and (not anchor or (file.suffix == ".md" and anchor in slugs(file)))


def commands(text):
    """Every `launch …` of a page, in its code blocks and in the middle of a sentence."""
    prose, code = split(re.sub(r"\\\n\s*", "", text))
    lines = [line.strip().removeprefix("$ ") for line in code]
    return [line for line in lines if line.startswith("launch ")] + re.findall(r"`(launch\s[^`]+)`", prose)


def find_problem(command):
    """What is wrong with a command line as the documentation quotes it; None: nothing."""
    words = shlex.split(re.sub(r"[][…|]", " ", command), comments=True)[1:]
    verb = words[0] if words and words[0] in verbs() else ""
    if not verb and not (words[0].startswith("-") or is_recipe(words[0])):
        return f"{words[0]} is neither a command nor a recipe"
    for word in words:
        flag = word.partition("=")[0]
        if re.match(r"--?[a-z]", word) and flag not in flags(verb):
            return f"launch {verb} has no {flag}"
        key = re.match(r"([a-z_.]+)=", word)
        if key and key[1] not in ("key", "profile.key") and not is_key(key[1]):
            return f"there is no {key[1]}"
    return None


def is_recipe(word):
    stem = Path(word).name.removesuffix(".yaml")
    return word.isupper() or stem == "recipe" or (ROOT / "recipes" / f"{stem}.yaml").is_file()


def is_key(key):
    return key.removeprefix("profile.") in PROFILE_KEYS if key.startswith("profile.") else key in keys()


@functools.cache
def help_of(verb):
    command = [sys.executable, "-m", "launcher", *filter(None, [verb]), "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


@functools.cache
def verbs():
    return set(re.findall(r"^ +(?:launch )?([a-z-]+)\b", help_of("").partition("commands:")[2], re.MULTILINE))


@functools.cache
def flags(verb):
    return {"-h", "--help", *re.findall(r"(?<![\w-])--?[a-z][a-z-]*", help_of(verb))}


@functools.cache
def keys():
    return dict(walk(SCHEMA))


def walk(node, prefix=""):
    """Each key of the schema that holds a value, in order, with its own schema."""
    for name, value in node["properties"].items():
        if "$ref" in value:
            yield from walk(SCHEMA["$defs"][value["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def table_of_keys():
    yield "| key | default | valid | meaning |"
    yield "|---|---|---|---|"
    for key, value in walk(SCHEMA):
        default = json.dumps(functools.reduce(getattr, key.split("."), Recipe()))
        meaning = " ".join(value["description"].split()).replace("|", "\\|")
        yield f"| `{key}` | `{default}` | {valid(value)} | {meaning} |"


def valid(value):
    """What a value can be, in words."""
    if "anyOf" in value:
        return " or ".join(valid(option) for option in value["anyOf"])
    if "enum" in value or "const" in value:
        return ", ".join(f"`{option}`" for option in value.get("enum", [value.get("const")]))
    if "$ref" in value:
        names = SCHEMA["$defs"][value["$ref"].rpartition("/")[2]]["properties"]
        return f"mapping with {', '.join(f'`{name}`' for name in names)}"
    if value["type"] == "array":
        return f"list of {valid(value['items'])}"
    if value["type"] == "object":
        return f"mapping to {valid(value['additionalProperties'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {value[name]}" for name, sign in signs.items() if name in value)
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    return f"{names[value['type']]} {limits}".strip()
