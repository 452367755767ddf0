"""The documentation: generated pages are what the code says, links lead somewhere, commands parse, quick ones run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from scripts.render_reference import PAGES, REQUEST_FIELDS, RESPONSE_HEADERS
from slos_serve.cli.main import COMMANDS, app
from slos_serve.core.slo import SLO, ClassSet, WhenFull, single_stage
from slos_serve.core.tasks import TaskPromise, with_task
from slos_serve.core.trust import Denied
from slos_serve.core.verdict import Verdict, Why
from slos_serve.files.class_file import load_classes, parse_classes
from slos_serve.perf.tasks import CallDue, TaskKey
from slos_serve.vllm_plugin.class_versions import ClassVersion
from slos_serve.vllm_plugin.front.answers import refusal, verdict_headers
from slos_serve.vllm_plugin.front.judged import Judged
from slos_serve.vllm_plugin.front.load_report import with_load
from slos_serve.vllm_plugin.front.mirror import Answer
from slos_serve.vllm_plugin.middleware import applied_headers, denied_header
from slos_serve.vllm_plugin.slo_args import HEADER_KEYS, SESSION_KEY, SLO_KEYS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXTS = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/*.md")])
RUNNER = CliRunner()


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_what_the_code_says(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == PAGES[page](), "run python scripts/render_reference.py"


def test_the_page_of_headers_has_every_field_and_header() -> None:
    assert set(REQUEST_FIELDS) == {*SLO_KEYS, SESSION_KEY} >= set(HEADER_KEYS.values())
    classes = [
        with_task(single_stage("a", SLO(ttft_ms=1.0, tpot_ms=1.0, e2e_ms=1.0)), TaskPromise(1.0)),
        single_stage("b", SLO(ttft_slowdown=2.0)),
        None,
    ]
    sent = {name.decode() for one in classes for name, _ in applied_headers(one)}
    judged = Judged(
        classes[0],
        0.0,
        ClassVersion(ClassSet()),
        Answer(Verdict.SECOND_BEST, Why.FITS, 1.0, 1.0, rank=1, start_s=1.0),
        classes[0],
        ttft_target_s=1.0,
        call=CallDue(TaskKey("", "s"), 1, 1.0, 1.0, 1.0, 1),
    )
    report, refused = with_load([], "TEXT", {"x": 1.0}), refusal(replace(judged, refusal=(429, 1)))[1]
    several = (*verdict_headers(judged), denied_header(Denied.CLASS), *report, *refused)
    told = {name.decode() for name, _ in several} - {"content-type", "content-length", "retry-after"}
    assert set(RESPONSE_HEADERS) == sent | told


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_internal_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        assert to.exists(), f"{page.name}: {target}"
        if page.parent == DOCS:
            assert to.is_relative_to(DOCS), f"{page.name}: {target} is not on the site"
        if anchor and to.suffix == ".md":
            assert anchor in anchors(to), f"{page.name}: {target}"


def pages_of(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages_of(target)


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages_of(site["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each ``slos-serve`` command in a page's code blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?slos-serve (.*)", line)
            if found:
                words = shlex.split(found[1].replace("...", ""), comments=True)
                yield words[: next((i for i, word in enumerate(words) if word in ("|", "&", "&&", ">")), None)]


ALL = [(page.relative_to(ROOT), words) for page in TEXTS for words in commands(page)]


def test_there_are_commands_to_check() -> None:
    assert len(ALL) > 25
    assert {words[0] for _, words in ALL} >= {"serve", "profile", "bench", "classes", "explain", "doctor", "size"}


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}:{' '.join(words)[:60]}" for page, words in ALL])
def test_a_command_parses(page: Path, words: list[str]) -> None:
    root: Any = get_command(app)
    if words[0].startswith("-"):
        return
    assert words[0] in COMMANDS, f"{page}: {words}"
    command = root.get_command(click.Context(root), words[0])
    rest = words[1:]
    if hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    rest = [word for word in rest if word not in ("[your", "vLLM", "arguments]")]
    command.make_context(words[0], rest)


def is_quick(words: list[str]) -> bool:
    return (words[0] == "explain" and "--url" not in words) or words[0] == "classes"


@pytest.mark.parametrize("words", [words for _, words in ALL if is_quick(words)], ids=" ".join)
def test_quick_commands_run(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "five-minutes.md").read_text(encoding="utf-8"), re.DOTALL)
    for name in ("classes.yaml", "FILE"):
        (tmp_path / name).write_text(blocks[0], encoding="utf-8")
    profile = (ROOT / "src" / "slos_serve" / "profiles" / "opt-13b-a100.json").read_text(encoding="utf-8")
    for name in ("profile.json", "PROFILE"):
        (tmp_path / name).write_text(profile, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_class_files_in_a_page_are_right(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if re.search(r"^classes:", block, re.MULTILINE):
            assert len(parse_classes(block, page.name)) >= 1


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^    |^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for module in re.findall(r"python -m benchmarks\.([a-z_]+)", text):
        assert (ROOT / "benchmarks" / f"{module}.py").exists(), f"{page.name}: {module}"
    for script in re.findall(r"(?:python |`)(scripts/[a-z_]+\.(?:py|sh))", text):
        assert (ROOT / script).exists(), f"{page.name}: {script}"


def test_the_table_of_when_full_has_every_kind() -> None:
    text = (DOCS / "classes.md").read_text(encoding="utf-8")
    for kind in WhenFull:
        assert f"| `{kind.value}` |" in text
    assert load_classes(ROOT / "examples" / "classes.yaml").default == "chat"


def test_the_lines_of_doctor_in_the_page_are_those_that_it_prints() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("## 2.")[2].partition("## 3.")[0]
    code = (ROOT / "src" / "slos_serve" / "cli" / "doctor.py").read_text(encoding="utf-8")
    code = re.sub(r"\{[^}]*\}", "...", code)
    lines = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        assert line in code or line.replace("SLOS_SERVE_PROFILE", "...") in code, line


def test_the_reasons_in_the_page_are_those_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("| `x-slo-reason` | Do |")[2].partition("If it binds")[0]
    told = set(re.findall(r"^\| `([a-z_]+)`", table, re.MULTILINE))
    kept = {"fits", "fits_at_prefix", "fits_elsewhere", "no_slo", "passed_over"}  # nothing to do about
    assert told == {why.value for why in Why} - kept
