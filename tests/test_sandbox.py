"""Templates of others: what they may not do, and that real ones render as in transformers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from fuzzing.hostile import MEMORY, PYTHON, TIME

from litlora.tokenizer import sandbox
from litlora.tokenizer.chat import ChatTemplate
from litlora.tokenizer.sandbox import Template

ROOT = Path(__file__).parents[1]
RENDER = """
import resource
from fuzzing.hostile import MEMORY, TIME
from jinja2 import TemplateError
from litlora.tokenizer import sandbox

sandbox.WORK, sandbox.SECONDS = 20_000, 0.05
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
messages = [{"role": "user", "content": "Hi " * 10}, {"role": "assistant", "content": "Hello"}]
for text in (*TIME, *MEMORY):
    try:
        result = len(sandbox.Template(text).render(messages=messages, tools=None))
    except TemplateError as error:
        result = str(error)
    print(ascii(f"{text[:60]}: {result}"))
"""


def test_templates_without_end_or_bounds_are_ended() -> None:
    """In a process of its own, which has little memory and may be killed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", RENDER], capture_output=True, text=True, timeout=300, env=env)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, len(TIME) + len(MEMORY)), done.stderr[-2000:] + done.stdout[-200:]
    assert "MemoryError" not in done.stdout
    assert sum("does too much" in line for line in lines) > 30


@pytest.mark.parametrize("text", PYTHON)
def test_templates_do_not_reach_python(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    try:
        written = Template(text).render(messages=messages)
    except jinja2.TemplateError:
        written = ""
    assert len(written) < 50  # nothing, or the name of a method
    assert messages == [{"role": "user", "content": "Hi"}]
    assert not list(tmp_path.iterdir())


def test_a_long_conversation_may_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds grow with what is put in, so that no honest one meets them."""
    monkeypatch.setattr(sandbox, "WORK", 1000)
    template = Template("{% for m in messages %}<{{ m.role }}>{{ (m.content | trim) ~ '\n' }}{% endfor %}")
    text = template.render(messages=[{"role": "user", "content": "word " * 400}] * 500)
    assert len(text) == 500 * (6 + 1999 + 1)
    slow = Template("{% for i in range(2000) %}{% endfor %}{{ messages[0].content }}")
    with pytest.raises(jinja2.TemplateError, match="does too much"):
        slow.render(messages=[{"role": "user", "content": "word"}])
    assert slow.render(messages=[{"role": "user", "content": "word " * 100}]).startswith("word")


def test_time_is_one_account_for_all_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that is a little slow each time does not hold up a million rows; CPU time, not the clock's."""
    now = [0.0]
    monkeypatch.setattr(sandbox.time, "thread_time", lambda: now[0])
    template = Template("{{ wait() }}")
    monkeypatch.setattr(sandbox.Sandbox, "is_safe_callable", lambda self, function: True)

    def wait() -> str:
        now[0] += sandbox.SECONDS / 10
        return "x"

    def many(count: int) -> None:
        for _ in range(count):
            template.render(wait=wait)

    many(10)
    with pytest.raises(jinja2.TemplateError, match="does too much"):
        many(3)


def test_an_account_ends_with_its_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put into the next one is weighed on nobody's account."""
    template = Template("{{ messages | length }}")
    assert template.render(messages=[1]) == "1"
    later = time.thread_time() + 3600
    monkeypatch.setattr(sandbox.time, "thread_time", lambda: later)
    assert template.render(messages=list(range(100_000))) == "100000"


def test_threads_have_their_own_account() -> None:
    from concurrent.futures import ThreadPoolExecutor

    template = Template("{% for i in range(50000) %}{% endfor %}done")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: template.render(messages=[]), range(8))) == ["done"] * 8


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": "What is 1 + 1? "},
    {"role": "assistant", "content": '<think>Two.</think> It\'s 2 < 3 & "two".'},
    {"role": "user", "content": "naïve 🦙"},
]
# as their authors write them: namespaces, slices, tests, filters, macros, JSON, loop variables, whitespace control
REAL = {
    "namespaces": """{%- set ns = namespace(system='', found=false) %}
        {%- for m in messages %}{%- if m['role'] == 'system' %}
        {%- set ns.system = ns.system ~ m['content'] | trim + '\\n\\n' %}{%- set ns.found = true %}{%- endif %}
        {%- endfor %}
        {{- bos_token }}{{ ns.system }}{% for m in messages if m.role != 'system' %}
        {% if loop.first and ns.found %}! {% endif %}{{ '<|' ~ m.role ~ '|>' }}
        {{- '' + (m.content.split('</think>')[-1]).lstrip() }}
        {{ eos_token if loop.last else '' }}{% endfor %}""",
    "macros": """{% macro show(m, last=false) %}[{{ m.role | upper | center(12) }}] {{ m.content | replace('"', "'") }}
        {{ m.content | indent(2) }}{% endmacro %}
        {% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}
        {% for m in rest[::-1] %}{{ show(m, loop.last) }} {{ loop.index0 % 2 == 0 }}{{ loop.cycle('a', 'b') }}
        {% endfor %}{% if (rest | length) is odd %}{{ rest | map(attribute='role') | join(', ') }}{% endif %}
        {% set text %}{{ bos_token }}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ text * 2 }}""",
    "filters": """{{ '%s: %d of %.2f' % ('a', 3, 1.5) }} {{ messages | tojson(indent=2) }} {{ messages[0] }}
        {{ {'a': [1, none, 'é'], 'b': {}} | tojson }}
        {% for k, v in {'x': 1, 'y': [2, 3]}.items() %}{{ k }}={{ v }};{% endfor %}
        {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
        {{ (messages | last).content | length * 2 ** 3 }}
        {{ 'a,b'.split(',') | first | title }} {{ [3, 1, 2] | sort | join('-') }} {{ [1, 1, 2] | unique | list }}
        {{ '{}-{:>4}'.format(1, 'b') }} {{ 3.14159 | round(2) }} {{ 'x'.ljust(3, '.') }} {{ -3 | abs }}
        {{ 7 // 2 }} {{ 7 % 4 }}
        {{ messages | map(attribute='content') | map('length') | sum }}
        {{ [1, 2, 3, 4] | batch(2) | list }} {{ '<b>' | e }}
        {{ dict(a=1, b=[2]) }} {{ (1, 'a', bos_token) }} {{ 'abc' | list }}
        {{ 'a\\nb' | indent(width=2, first=true) }} {{ 2.555 | round(precision=1) }}
        {{ [1, 2, 3] | batch(linecount=2) | list }}
        {{ [] }} {{ messages[1:2] }} {{ 'x' if 2 > 1 > 0 else 'y' }} {{ 3 in [1, 2, 3] and 'in' }} {{ none }} {{ true }}
        {{ 'a-b' | replace('-', '') | string }}""",
    "tests": """{%- if tools is not none %}{{ tools }}{% endif -%} {% for m in messages %}
        {% if not loop.first %}{% continue %}{% endif %}{{- m['content'].strip().startswith('Be') }}
        {{ m.get('tool_calls', 'none') }}{{ 'content' in m }}{{ m.content is string }}{{ m.x is defined }}{% endfor %}
        {% generation %}{{ messages[-1].content[:3] ~ messages[-1]['content'][-1] }}{% endgeneration %}{{ [1] + [2] }}
        {% if add_generation_prompt %}{{ raise_exception and 'go' }}{% endif %}{{ 'a' 'b' }}
        {{ 1 ~ 2 ~ none }}{{ nothing }}""",
}


@pytest.mark.parametrize("name", REAL)
def test_real_templates_render_as_in_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(REAL[name], tokens, "here").render(CHAT, add_generation_prompt=True)
    theirs, _ = render_jinja_template(
        conversations=[CHAT], chat_template=REAL[name], add_generation_prompt=True, tools=None, documents=None, **tokens
    )
    assert ours == theirs[0]
    assert len(ours) > 30
