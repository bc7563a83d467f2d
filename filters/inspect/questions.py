"""Ten common questions about a dataset, answered by `duckdb -readonly metadata.duckdb`."""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """A question and the SQL that answers it."""

    title: str
    sql: str


QUESTIONS = (
    Question("Where did my samples go?", "FROM funnel"),
    Question(
        "Which hosts fail most?",
        "FROM hosts WHERE tried >= 10 ORDER BY failed DESC, host LIMIT 10",
    ),
    Question(
        "Why was this image dropped?",
        "SELECT stage, reason, error_message FROM drops WHERE url LIKE '%-00042.%'",
    ),
    Question(
        "How many images fail to download, and why?",
        "SELECT reason, count(*) AS num, any_value(url) AS example FROM drops WHERE stage = 'download' "
        "GROUP BY reason ORDER BY num DESC",
    ),
    Question(
        "How are the aesthetic scores of the kept samples distributed?",
        "SELECT round(aesthetic, 1) AS score, count(*) AS num FROM kept GROUP BY score ORDER BY score",
    ),
    Question(
        "How large are the kept images really?",
        "SELECT quantile_disc(least(original_width, original_height), [0, 0.1, 0.5, 0.9, 1]) AS side_px FROM kept",
    ),
    Question(
        "Which samples speak of red circles?",
        "SELECT key, caption, url FROM kept WHERE caption ILIKE '%red circle%' ORDER BY key LIMIT 10",
    ),
    Question(
        "Which images are duplicates of one another?",
        "SELECT group_id, kind, list(url) AS urls FROM duplicates JOIN selection USING (uid) GROUP BY ALL LIMIT 10",
    ),
    Question(
        "Where is the latent of this URL, so that I can remove it?",
        "SELECT url, key, tar, \"offset\", num_bytes FROM latents WHERE url LIKE '%-00042.%'",
    ),
    Question(
        "Which stage takes how long?",
        "SELECT stage, sum(num_in) AS num, round(sum(seconds), 1) AS seconds, round(sum(num_in) / sum(seconds), 1) "
        "AS per_s FROM stages GROUP BY stage ORDER BY seconds DESC",
    ),
)
