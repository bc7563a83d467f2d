"""The rules that a recipe can name, and their SQL."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from filters.ask_rules import COLUMN as ANSWERS
from filters.ask_rules import SQL as ASKED_SQL
from filters.ask_rules import parse_questions
from filters.carried_rules import WANTED, carried_condition, is_for_carried
from filters.columns import TABLES, TYPES
from sdtrain.errors import UserError
from sdtrain.settings import nearest

RuleValue = bool | float | str | list[str]

# SQL over `{caption}`: \p{L} is a letter of any script; white space of any kind separates words.
_ENDINGS = "jpe?g|jfif|png|gif|webp|bmp|tiff?|svg|heic|heif|avif|ico|psd|raw|cr2|nef|mp4|mov|avi|pdf"
# Default image names of cameras, phones and programs.
_DEVICES = (
    "img|imag|image|images|_?dsc|dscn|dscf|dcim|sdc|sam|pic|pict|picture|photo|foto|fotos|imgp|cimg|hpim|mvi|vid|gopr|"
    "wp|pxl|kif|scan|screenshot|screen shot|slide|figure|fig|file|untitled|unnamed|noname|no name|thumbnail|thumb|"
    "default|dji|whatsapp image|bild|imagen|immagine|obr"
)
_NUMBERS = "[-_ .():x#0-9]*"
_NAMES = (
    rf"\S+[.](?:{_ENDINGS})",  # one word with an image file's suffix
    # Numbers, dates and times follow: "IMG-20190504-WA0012", "Screenshot 2021-03-04 at 10.11.12".
    rf"(?:{_DEVICES})(?:[-_ .]?(?:img|image|copy))?{_NUMBERS}(?:(?:at|wa|copy){_NUMBERS})?(?:[.](?:{_ENDINGS}))?",
    r"p[0-9]{5,}",
    r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}|[0-9a-f]{16,}",  # digests and ids of content systems
    r"\P{L}*",  # no letter: empty, numbers, dates, stars
)
_IS_NAME = rf"regexp_full_match({{caption}}, '(?is)\s*(?:{'|'.join(_NAMES)})\s*')"
# No regular expression, which would take five times as long.
_BLANK_CODES = (*range(9, 14), *range(28, 32), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F)
_BLANKS = "".join(map(chr, (*_BLANK_CODES, 0x205F, 0x3000)))
_ONE_BLANK = f"translate({{caption}}, '{_BLANKS}', '{' ' * len(_BLANKS)}')"
_NUM_WORDS = f"len(list_filter(string_split({_ONE_BLANK}, ' '), lambda word: word <> ''))"

_HAS_SIZE = "{width} > 0 AND {height} > 0"
# Derived columns for rules.
DERIVED: dict[str, str] = {
    "side": f"CASE WHEN {_HAS_SIZE} THEN least({{width}}, {{height}}) END",
    "aspect_ratio": f"CASE WHEN {_HAS_SIZE} THEN greatest({{width}}, {{height}}) / least({{width}}, {{height}}) END",
    "caption_chars": "length({caption})",
    "caption_words": _NUM_WORDS,
    "caption_is_name": _IS_NAME,
}


_FILLED_IN = ("width", "height", "caption")


def sources_of(column: str) -> tuple[str, ...]:
    """Returns the table columns that a column is derived from; else the column itself.

    ValueError if it is derived from none, or from others than those that every stage fills in.
    """
    if column not in DERIVED:
        return (column,)
    named = tuple(dict.fromkeys(re.findall(r"\{([a-z_]\w*)\}", DERIVED[column])))
    if not named or set(named) - set(_FILLED_IN):
        raise ValueError(
            f"DERIVED['{column}'] must name one or more of {', '.join(f'{{{name}}}' for name in _FILLED_IN)} "
            f"and nothing else between braces; it names {', '.join(named) or 'none'}"
        )
    return named


_VALUES = {float: "a number", bool: "true or false", list: "a list of words, such as [en, de]", str: "a comparison"}
_BOUND = (float, list)


@dataclass(frozen=True)
class Rule:
    """A condition that a sample must meet; its column decides where it applies.

    Attributes:
        column: NULL there counts as a reason of its own.
        sql: the condition, with one `?` for the recipe's value if that is a number or words.
        meaning: why a sample fails; `{value}` is the recipe's value.
        kind: of the recipe's value: a number (float), a bool, words (list) or a comparison (str).
        pushdown: (column, operator) pairs that hold, with the recipe's value, for every passing row; on the files' own
            columns, so that DuckDB can skip row groups by their statistics.
        stage: whose table has the column; None for those of `filters.columns.TABLES`, and what is derived from them.
        carried: whether its column is one of `select.carry`.
        ignores_case: whether words are bound in lower case.
    """

    column: str
    sql: str
    meaning: str
    kind: type = float
    pushdown: tuple[tuple[str, str], ...] = ()
    stage: str | None = None
    carried: bool = False
    ignores_case: bool = True

    def __post_init__(self) -> None:
        self._check_column()
        num_values = re.sub("'[^']*'", "", self.sql).count("?")
        if self.kind not in _VALUES or num_values != (self.kind in _BOUND):
            raise ValueError(f"the rule on column '{self.column}' needs one `?` for its value, and none for a bool")

    def _check_column(self) -> None:
        if self.carried:
            return
        if self.stage is not None:  # `filters.pipeline.in_order` checks that its table has the column
            if self.column in TABLES or self.column in DERIVED:
                raise ValueError(f"column '{self.column}' of stage '{self.stage}' has the name of another")
            return
        unknown = [name for name in self.sources if name not in TABLES]
        if unknown:
            raise ValueError(
                f"a rule looks at column '{self.column}', and no table is known to have {', '.join(unknown)}: "
                "add it to filters.columns, or to filters.rules.DERIVED if it follows from other columns, or name the "
                "`stage` whose table has it"
            )
        if not (self.in_select or self.in_decide):
            raise ValueError(f"no stage has all that column '{self.column}' follows from: {', '.join(self.sources)}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The table columns that its column is, or is derived from."""
        return (self.column,) if self.carried else sources_of(self.column)

    @property
    def column_sql(self) -> str:
        """Its column as SQL."""
        return f'"{self.column}"' if self.carried else self.column

    @property
    def in_select(self) -> bool:
        """Whether the metadata has its column; otherwise only a decoded image does."""
        return self.carried or (self.stage is None and all("metadata" in TABLES[name] for name in self.sources))

    @property
    def in_decide(self) -> bool:
        """Whether its column is available after the download; otherwise only the metadata has it."""
        return self.carried or self.stage is not None or all(TABLES[name] - {"metadata"} for name in self.sources)


def _limit(column: str, operator: str, meaning: str) -> Rule:
    return Rule(column, f"{column} {operator} ?", meaning, pushdown=((column, operator),))


def _one_of(column: str, meaning: str) -> Rule:
    sql = f"list_contains(?, lower({column}))"
    return Rule(column, sql, meaning, kind=list, pushdown=((column, "in"),))


_BOTH_SIDES = (("width", ">="), ("height", ">="))
RULES: dict[str, Rule] = {
    "min_side": Rule("side", "side >= ?", "shorter side under {value} px", pushdown=_BOTH_SIDES),
    "max_aspect_ratio": Rule("aspect_ratio", "aspect_ratio <= ?", "sides differ by more than {value} times"),
    "min_aesthetic": _limit("aesthetic", ">", "aesthetic score not over {value}"),
    "min_aesthetic_v1": _limit("aesthetic_v1", ">", "aesthetic score of LAION's first predictor not over {value}"),
    "max_watermark": _limit("pwatermark", "<", "watermark probability not under {value}"),
    "max_unsafe": _limit("punsafe", "<", "unsafe probability not under {value}"),
    "min_similarity": _limit("similarity", ">", "caption similarity not over {value}"),
    "max_similarity": _limit("similarity", "<", "caption similarity not under {value}"),
    "min_caption_chars": Rule("caption_chars", "caption_chars >= ?", "caption shorter than {value} characters"),
    "max_caption_chars": Rule("caption_chars", "caption_chars <= ?", "caption longer than {value} characters"),
    "min_caption_words": Rule("caption_words", "caption_words >= ?", "caption of fewer than {value} words"),
    "no_filename_captions": Rule(
        "caption_is_name", "NOT caption_is_name", "caption empty, without words, or the name of a file or camera", bool
    ),
    "languages": _one_of("language", "language not one of {value}"),
    "nsfw_tags": _one_of("nsfw", "NSFW tag not one of {value}"),
    # Measures of filters.score.preprocess.
    "min_sharpness": Rule("sharpness", "sharpness >= ?", "sharpness under {value}"),
    "min_entropy": Rule("entropy", "entropy >= ?", "gray levels of an entropy under {value} bits"),
    "max_border": Rule("border", "border <= ?", "more than the share {value} of the image is border of one colour"),
    "min_contrast": Rule("contrast", "contrast >= ?", "nearly one colour: contrast under {value}"),
    "ask": Rule(ANSWERS, ASKED_SQL, "the probability of yes is not {value}", list, stage="ask", ignores_case=False),
}


def rule_of(name: str, value: RuleValue) -> Rule:
    """Returns a recipe's rule: a known one, or one on the carried column `name`."""
    return RULES[name] if name in RULES else Rule(name, *carried_condition(name, value), carried=True)


def select_item(column: str) -> str:
    """Returns the SELECT item of a rule's column, from the selection `s` in metadata form."""
    return derived_sql((column,), "s.width", "s.height", "s.caption") if column in DERIVED else _as_number("s", column)


def decide_item(column: str, decide_by: str) -> str:
    """Returns an `in_decide` column's SELECT item from selection `s`, images `i`, scores `c`; see `DecideConfig`."""
    if column not in TABLES and column not in DERIVED:  # carried
        return f's."{column}"'
    if column in DERIVED:
        return derived_sql((column,), "i.original_width", "i.original_height", "s.caption")
    if "images" in TABLES[column]:
        return f"i.original_{column} AS {column}"
    is_ours = "scores" in TABLES[column] and (decide_by != "metadata" or "selection" not in TABLES[column])
    return _as_number("c" if is_ours else "s", column)


def stage_item(rule: Rule, table: str) -> str:
    """Returns the SELECT item of the column of a rule with a `stage`, from that stage's table."""
    return f"{table}.{rule.column}{'::DOUBLE' if rule.kind is float else ''} AS {rule.column}"


def stage_rules(rules: Mapping[str, RuleValue]) -> dict[str, list[Rule]]:
    """Returns by stage the rules in use that look at its table, one for each column."""
    found: dict[str, dict[str, Rule]] = {}
    for rule in (rule_of(name, rules[name]) for name in active_rules(rules)):
        if rule.stage is not None:
            found.setdefault(rule.stage, {})[rule.column] = rule
    return {stage: list(found[stage].values()) for stage in sorted(found)}


def _as_number(table: str, column: str) -> str:
    is_text = TYPES.get(column) == "VARCHAR"
    return f"{table}.{column}" if is_text else f"{table}.{column}::DOUBLE AS {column}"


def derived_sql(
    names: Iterable[str] = tuple(DERIVED), width: str = "width", height: str = "height", caption: str = "caption"
) -> str:
    """Returns SELECT items for derived columns, from the given columns or expressions."""
    columns = {"width": width, "height": height, "caption": caption}
    return ", ".join(f"{_filled(DERIVED[name], columns)} AS {name}" for name in names)


def _filled(template: str, columns: Mapping[str, str]) -> str:
    # Not str.format: regular expressions contain braces.
    for name, sql in columns.items():
        template = template.replace(f"{{{name}}}", sql)
    return template


def check_rules(
    rules: Mapping[str, Any], in_decide: bool = False, carried: Collection[str] | None = ()
) -> dict[str, RuleValue]:
    """Validates the rules (name -> value) of a recipe, with `in_decide` those of `decide.rules`; numbers become floats.

    `carried` names the columns of `select.carry`, on which there may be rules too; None if they are not known yet, and
    `check_carried` must follow. UserError for an unknown rule (with the nearest one), a value of the wrong kind, or a
    rule not usable there.
    """
    return {name: _checked(name, value, in_decide, carried) for name, value in rules.items()}


def check_carried(rules: Iterable[str], carried: Collection[str]) -> None:
    """Raises `UserError` for a rule that is neither known nor on a carried column."""
    for name in rules:
        if name not in RULES and name not in carried:
            raise UserError(
                f"unknown rule '{name}'.{nearest(name, [*RULES, *carried])} A rule on a column of the metadata needs "
                "it in select.carry."
            )


def _checked(name: str, value: Any, in_decide: bool, carried: Collection[str] | None) -> RuleValue:
    if name not in RULES and (carried is None or name in carried) and is_for_carried(value):
        return value if isinstance(value, bool) else list(value) if isinstance(value, list) else str(value)
    if name not in RULES and carried and name in carried:
        raise UserError(f"rule '{name}', on a carried column, wants {WANTED}, not {value!r}")
    check_carried([name], carried or ())
    rule = RULES[name]
    if in_decide and not rule.in_decide:
        raise UserError(
            f"rule '{name}' looks at column '{rule.column}', which only the metadata has; move it to `select.rules`"
        )
    if not in_decide and not rule.in_select:
        raise UserError(
            f"rule '{name}' looks at '{rule.column}', which only a decoded image has; move it to `decide.rules`"
        )
    if name == "ask" and value is not False:
        return parse_questions(value)
    if (rule.kind is bool or name == "ask") and isinstance(value, bool):
        return value
    if rule.kind is list and isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        return list(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if rule.kind is float and is_number and math.isfinite(value):
        return float(value)
    raise UserError(f"rule '{name}' wants {_VALUES[rule.kind]}, not {value!r}")


def active_rules(rules: Mapping[str, RuleValue]) -> list[str]:
    """Returns the names of rules that are not set to false."""
    return [name for name, value in rules.items() if value is not False]


def reason_case(
    rules: Mapping[str, RuleValue], first: list[tuple[str, str]] | None = None, null_passes: Collection[str] = ()
) -> tuple[str, list[float | list[str]]]:
    """Returns SQL for the first reason that drops a row (NULL if it stays), and the values to bind.

    A reason is a rule's name, or `<column>_missing` if the column is NULL and not in `null_passes`. `first` holds
    (reason, condition to stay) pairs to check before the rules.
    """
    branches = [f"WHEN NOT coalesce({stays}, false) THEN '{reason}'" for reason, stays in first or []]
    values: list[float | list[str]] = []
    for name in active_rules(rules):
        rule, value = rule_of(name, rules[name]), rules[name]
        if rule.column not in null_passes:
            branches.append(f"WHEN {rule.column_sql} IS NULL THEN '{rule.column}_missing'")
        branches.append(f"WHEN NOT ({rule.sql}) THEN '{name}'")
        if rule.kind in _BOUND and not isinstance(value, bool | str):
            values.append(lower_case(value) if isinstance(value, list) and rule.ignores_case else value)
    return (f"CASE {' '.join(branches)} END" if branches else "NULL::VARCHAR"), values


def lower_case(words: Iterable[str]) -> list[str]:
    """Normalizes words as the rules compare them."""
    return [word.lower() for word in words]


def explain(reason: str, rules: Mapping[str, RuleValue]) -> str:
    """Describes a reason for the funnel."""
    if reason in rules:
        value = rules[reason]
        shown = value if isinstance(value, str) else ", ".join(value) if isinstance(value, list) else f"{value:g}"
        return rule_of(reason, value).meaning.replace("{value}", shown)
    return in_words(reason)


def in_words(reason: str) -> str:
    """Describes a reason that is not a rule."""
    if reason.endswith("_missing"):
        return f"no value for {reason.removesuffix('_missing')}"
    return reason.replace("_", " ")
