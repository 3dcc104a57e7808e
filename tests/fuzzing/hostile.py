"""What nobody's files hold by accident: paths that lead out, expressions that never end, templates that take all the
memory or try to get at Python, bombs of YAML. `canary` is a file that code of theirs would make; {secret} is a
directory beside the desk that nothing may read."""

# ruff: noqa: E501 (lists of texts)

from __future__ import annotations

PATHS = (
    "../secret/model.safetensors", "../../secret/config.json", "../secret", "/etc/passwd", "..", ".", "/", "//", "",
    "~/.bashrc", "file:///etc/passwd", "..\\secret", "model.safetensors/../../secret/x", "link", "a/b", "\\\\h\\s",
    "{secret}/model.safetensors", "{secret}/template.jinja", "/dev/zero", "/dev/stdin", "/proc/self/mem",
)  # fmt: skip
EXPRESSIONS = (
    "(a+)+$", "(.*)*x", "(.|.)*x", "(?:.?){40}x", ".*.*.*.*.*.*.*.*.*.*.*.*x", "((((((.*)*)*)*)*)*)*x", "(", "[", "\\",
    "(?P<n>.)(?P=n)*", "a{4294967296}", "(?:(?:(?:.{1,99}){1,99}){1,99})", "(?i:x)*", "^(([a-z_.0-9])+.)+Q$",
    "(?=.*)*", ".*q_proj", ".*(q|v)_proj", "\\p{L}+", "(?<=a+)b", "()" * 200, "(?i)q_proj", "a)|(b", "(?s).", "",
)  # fmt: skip


def _growing(start: str, step: str, end: str = "{{ ns.x }}") -> str:
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(200) %}}{{% set ns.x = {step} %}}{{% endfor %}}{end}"
    )


_LOOP = "{% for a in range(99999) %}"
_END = "{% endfor %}"
TIME = (
    _LOOP * 3 + _END * 3,
    _LOOP * 2 + "x" + _END * 2,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for m in messages recursive %}{{ loop([m, m]) }}{% endfor %}",
    "{% macro f() %}{% set ns.x = varargs %}{% endmacro %}" + _growing("[1]", "[1]", "{{ f(ns.x, ns.x) }}"),
    _growing("[1]", "[ns.x, ns.x]"),
    _growing("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
    _growing("[1]", "[ns.x, ns.x]", "{{ ns.x == [ns.x, ns.x] }}"),
    _growing("[1]", "{1: ns.x, 2: ns.x}", "{{ ns.x | upper }}"),
    _growing("[1]", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    _growing("[1]", "dict(a=ns.x, b=ns.x)", "{{ ns.x ~ '' }}"),
    _growing("[1]", "namespace(a=ns.x, b=ns.x)"),
    _growing("[1]", "[ns.x]", "{{ ns.x ~ 'a' }}"),
    _growing("[1]", "[ns.x]").replace("200", "99999"),
    _growing("messages", "ns.x + ns.x", "{{ ns.x | sort(attribute='role') | list | length }}"),
    "{{ " + "'a' * 99999 ~ " * 2000 + "'' }}",
    "{{ 9 ** 9 ** 9 ** 9 }}", "{{ 10 ** 99999 }}", "{{ 5 | round(-10 ** 10) }}", "{{ [1] | slice(10 ** 10) | list }}",
    "{{ ('a ' * 99999) | wordwrap(1) }}", "{{ ('<' * 99999) | striptags }}", "{{ ('http://' * 9999) | urlize }}",
    "{{ ('ü' * 99999).encode('punycode') }}", "{{ ('a' * 99999).split('a') | map('upper') | list | join }}",
    "{% set l = range(99999) | list %}{% for x in l if 'a' in l %}{% endfor %}", "{{ range(99999) | select('in', range(99999) | list) | list }}",
    "{% set l = range(99999) | list %}{{ range(99999) | reject('eq', l) | map('string') | select('in', l) | list }}", "{% set l = range(99999) | list %}" + "{{ 'a' in l }}" * 3000,
    "{{ range(10 ** 10) | list }}", "{{ range(99999) | map('string') | sort | unique | list | join }}",
)  # fmt: skip
MEMORY = (
    _growing("'aaaaaaaa'", "ns.x ~ ns.x"), _growing("'aaaaaaaa'", "ns.x + ns.x"), _growing("2", "ns.x * ns.x"),
    _growing("'aaaaaaaa'", "ns.x.replace('a', 'aa')"), _growing("'aaaaaaaa'", "ns.x | replace('a', 'aa')"),
    _growing("'a'", "[ns.x, ns.x] | join"), _growing("'a'", "'%s%s' % (ns.x, ns.x)"), _growing("'a'", "ns.x[0:] ~ ns.x[0:]"),
    _growing("'a'", "'{0}{0}'.format(ns.x)"), _growing("'a\\n'", "ns.x | indent(900)"), _growing("[1]", "ns.x + ns.x"),
    _growing("[]", "ns.x + [messages | tojson]").replace("200", "99999"),
    "{% set l = range(99999) | list %}{% set x %}{% for i in range(9999) %}{{ l }}{% endfor %}{% endset %}", "{{ 'a\\t'.expandtabs(tabsize=10 ** 11) }}",
    "{{ 'a' | center(width=10 ** 11) }}", "{{ [1] | batch(linecount=10 ** 10, fill_with=0) | list }}", "{{ 'a' | indent(width=10 ** 11, first=true) }}",
    "{% set l = range(99999) | list %}{% macro f() %}{{ l }}{{ l }}{% endmacro %}{% for i in range(9999) %}{% set x = f() %}{% endfor %}",
    "{% set x %}{{ 'a' * 99999 }}{% endset %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(200) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{{ 'a' * 10 ** 12 }}", "{{ [0] * 10 ** 11 }}", "{{ (1, 2) * 10 ** 11 }}", "{{ 'a'.ljust(10 ** 11) }}",
    "{{ '%999999999999d' % 1 }}", "{{ '%*d' % (999999999, 1) }}", "{{ '{:999999999999}'.format(1) }}",
    "{{ '{0:>{1}}'.format(1, 9999999999) }}", "{{ 'a' | center(10 ** 11) }}", "{{ 'a' | indent(10 ** 11, true) }}",
    "{{ '%99999999999s' | format('a') }}", "{{ lipsum(n=10 ** 8) }}", "{{ range(99999) | list | join('a' * 99999) }}",
    "{{ ('a' * 99999).replace('', 'a' * 99999) }}", "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
    "{{ [1] | batch(10 ** 10, 0) | list }}", "{{ messages | tojson(indent=10 ** 10) }}", "{{ '1'.zfill(10 ** 11) }}",
    "{{ messages | tojson(separators=('a' * 99999, 'b' * 99999)) }}", "{{ (1).to_bytes(10 ** 11, 'big') }}",
    "{{ strftime_now('%2147483647Y') }}", "{{ 'a\\t'.expandtabs(10 ** 11) }}", "{{ 'a'.translate({97: 'a' * 10 ** 12}) }}",
    "{{ ('a' * 99999).join('a' * 99999) }}", "{{ range(99999) | map('center', 99999) | list }}",
)  # fmt: skip
PYTHON = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__base__ }}", "{{ joiner.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}", "{{ ''|attr('__class__') }}", "{{ dict.mro() }}",
    "{{ self.__init__.__globals__.__builtins__.open('canary', 'w') }}", "{{ '%s' | attr('format') }}",
    "{{ ().__class__.__bases__[0].__subclasses__() | map(attribute='__init__') | list }}",
    "{{ messages | map(attribute='__class__.__mro__') | list }}", "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ lipsum.__globals__['os'].popen('touch canary').read() }}", "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.sys.modules }}", "{{ strftime_now.__globals__ }}", "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends '../secret/template.jinja' %}",
    "{% from 'os' import system %}", "{% block a %}{{ super() }}{% endblock %}", "{% set messages = messages.clear() %}",
    "{{ messages[0].update({'role': 'x'}) }}", "{{ environment }}", "{{ self._TemplateReference__context.environment }}",
)  # fmt: skip
WRONG = (
    "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ nothing.at.all }}", "{{ messages[99] }}", "{{ messages['a'].b }}",
    "{{ 1 + 'a' }}", "{{ [] > 1 }}", "{{ {}[[]] }}", "{{ none() }}", "{{ none.a }}", "{{ ' '.join(1) }}", "{{ tools.x }}",
    "{{ messages | first | upper }}", "{{ '\\ud800' }}", "{{ '\\0' }}", "{% generation %}", "{% break %}", "{# open",
    "{% generation %}x{% endgeneration %}", "{% for x in 5 %}{% endfor %}", "{% raw %}{{{% endraw %}", "{{ 5() }}",
    "{{ " + "(" * 3000, "{{ 1 " + "+ 1 " * 5000 + "}}", "{% if 1 %}" * 200, "{{ " + "-" * 9000 + "1 }}",
    "{% if 1 %}" * 50 + "{% endif %}" * 50, "{% for i in range(10) %}" * 25 + _END * 25, "{{ x" + ".a" * 3000 + " }}",
    "{{ 'a' | " + "upper | " * 3000 + "lower }}", "{{ [" + "[" * 500 + "]" * 500 + "] }}", "a" * 59_000, "a" * 600_000, "{{ [x, x] }}" * 4000, "{{ 1" + "~x" * 7000 + " }}",
    "{{ strftime_now('%d %b %Y') }}", "{{ strftime_now(1) }}", "{{ strftime_now('\\ud800') }}", "{% set x = %}",
)  # fmt: skip
TEMPLATES = (*TIME, *MEMORY, *PYTHON, *WRONG)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def _laughs(merge: str) -> str:
    """Each name stands for two of the one before it: 2^60 in the end."""
    lines = [f"a{i}: &a{i} " + merge.format(f"[*a{i - 1}, *a{i - 1}]") + "\n" for i in range(1, 60)]
    return "a0: &a0 " + ("{seed: 1}\n" if "<<" in merge else "[x, x]\n") + "".join(lines)


YAML = (
    _laughs("{}"), _laughs("{{<<: {}}}"), "prompt_style: " + nested(3000), "a: " * 3000 + "1", "- " * 3000 + "1",
    "&a [*a]", "lora_r: &a [*a]", "!!python/object/apply:os.system ['touch canary']", "seed: !!binary aGVsbG8=",
    "prompt_style: !!python/object/new:os.system ['touch canary']", "prompt_style: !!python/name:os.system", "? [a, b]\n: 1",
    "lora_r: !!python/tuple [1, 2]", "lora_r: !!int '0x" + "f" * 9000 + "'", "seed: " + "9" * 9000, "seed: 2001-01-01",
    "seed: 1" + ":59" * 5000, "learning_rate: " + "9" * 400 + ".0e999", "lora_r: 0b" + "1" * 9000, "data_path: 1",
    "learning_rate: .nan", "learning_rate: .inf", "data_path: [a]", "config: '{secret}/config.yaml'", "config: [a, b]",
    "print_config: true", "help: true", "debug: true", "lora_r: {a: 1}", "seed: ${oc.env:HOME}", "seed: $(touch canary)",
    "class_path: os.system\ninit_args: {command: touch canary}", "lora_r: 1\nlora_r: 2", "lora_r: ~", "null: 1", "1: 2",
    "true: false", "? \n: \n", "%YAML 9.9\n---\nlora_r: 1", "---\n---\n", "...", "lora_r: 1\n---\nlora_r: 2", "\tlora_r: 1",
    "lora_r: '", 'prompt_style: "\\ud800"', 'prompt_style: "\\x00"', "prompt_style: |\n" + "  a\n" * 20000, "<<: 1",
    "quantize: bnb.nf5", "epochs: 1.5", "epochs: -1", "devices: 99999999999999999999", "<<: {lora_r: 1}", "lora_r.a: 8",
    "finetune_lora: {lora_r: 1}", "lora_r: 8\nlora.r: 8", "lora_r+: 8", "--lora_r: 8", "lora_r: 0o17", "lora_r: 1_0",
    "k" * 50000 + ": 1", "#" * 50000, "a: [" + "1," * 45000 + "1]", "".join(f"k{i}: 1\n" for i in range(9000)),
)  # fmt: skip
