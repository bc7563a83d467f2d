"""URLs are found by host and by themselves as by the rules that take every URL apart."""

import duckdb
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from filters.exposure.find import _TRIMMED_URL
from filters.select import sql_functions
from filters.select.list_entries import read_host
from filters.select.sql_functions import of_hosts_sql, register_host_of

LABELS = st.sampled_from(["a", "B", "img", "a-b", "x_y", "müller", "k", "K", "\u017f", "s", "com", "1", "%41", ""])
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
ENDS = st.sampled_from(
    ["", "/", "/x.jpg", "?q=a.com", "#a", ":8080/y", "\\@b.com/", "@c.com/", " ", "\n", "\t/z", "\u00a0"]
)
BEGINS = st.sampled_from(
    ["http://", "HTTPS://", "ftp://", "//", "", " http://", "\u3000https://", "http://u:p@", "http://[::1]", "http:/"]
)
URLS = st.builds("{}{}{}".format, BEGINS, NAMES, ENDS)


def hosts_of(names):
    """As lists and options give them."""
    for name in names:
        try:
            yield read_host(name)
        except ValueError:
            continue


HOSTS = st.lists(NAMES, max_size=4).map(lambda names: sorted(set(hosts_of([*names, "[::1]"]))))


@pytest.fixture(scope="module")
def connection():
    with duckdb.connect() as connection:
        register_host_of(connection)
        yield connection


def matching(connection, urls, hosts):
    condition = of_hosts_sql("url", hosts, "$wanted")
    asked = f"SELECT coalesce({condition}, false) FROM (SELECT unnest($urls) AS url)"
    bound = {"urls": urls} | ({"wanted": hosts} if hosts else {})
    return [is_of for (is_of,) in connection.execute(asked, bound).fetchall()]


@settings(max_examples=50, deadline=None)
@given(urls=st.lists(st.one_of(URLS, st.text(max_size=12), st.none()), min_size=1, max_size=30), hosts=HOSTS)
@example(urls=["http://b.a.com/", "http://ba.com/", "http://a.com.b/", "http://a.com.:1/"], hosts=["a.com"])
def test_hosts_are_found_as_where_each_url_is_taken_apart(connection, urls, hosts):
    quick = matching(connection, urls, hosts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sql_functions, "_MOST_IN_PATTERN", 0)
        assert quick == matching(connection, urls, hosts)


@settings(max_examples=50, deadline=None)
@given(urls=st.lists(st.one_of(URLS, st.text(max_size=6), st.none()), min_size=1, max_size=30))
def test_urls_are_trimmed_where_that_changes_them(connection, urls):
    rows = connection.execute(f"SELECT {_TRIMMED_URL}, trim(url) FROM (SELECT unnest(?) AS url)", [urls]).fetchall()
    assert [quick for quick, _ in rows] == [trimmed for _, trimmed in rows]
