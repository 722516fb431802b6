"""The layers of settings: what is accepted, which one wins, and how what is wrong is named."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightfs.app.settings import check_chunks, engine_settings, fetch_settings
from weightfs.config import Config, HeaderRule, find_file, load
from weightfs.config.load import MAX_FILE_BYTES, check, default_cache, variable_of
from weightfs.config.model import MirrorRule, keys_of
from weightfs.core.bandwidth import Timetable
from weightfs.core.geometry import MIB
from weightfs.core.manifest import Policy
from weightfs.engine.settings import FillMode
from weightfs.errors import ConfigError, UsageError

KEY = base64.b64encode(b"Ed" + bytes(40)).decode()


def load_text(tmp_path: Path, text: str, options: dict[str, Any] | None = None, **env: str) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load(options or {}, file=file, env={"HOME": str(tmp_path), **env})


def test_everything_at_once(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        f"""
        cache = "~/models-cache"
        refs = ["https://models.example.com/m.gguf"]
        fill = "all"
        allow-other = true
        passthrough = false
        browse = true
        browse-ttl = "5m"
        browse-timeout = 3
        read-timeout = "1m"
        policy = "strict"
        trusted-keys = ["{KEY}"]
        workers = 2
        max-jobs = 8
        bandwidth = "8:00,2MiB  18:00,off"
        readahead = "32MiB"
        commit-size = "8MiB"
        commit-interval = 0.5
        retry = 7
        retry-delay = "100ms"
        timeout = 12
        connect-timeout = "3s"
        stall-timeout = "9s"
        proxy = "http://proxy.example.com:3128"
        ca-file = "/etc/ssl/own.pem"
        private-hosts = ["mirror.LAN"]
        log-level = "debug"
        log-json = true
        log-file = "/var/log/weightfs.log"
        [[header]]
        name = "Authorization"
        prefix = "Bearer "
        value-env = "TOKEN"
        [[mirror]]
        prefix = "https://models.example.com/"
        url = "http://mirror.lan/models/"
        [[host]]
        name = "Mirror.lan"
        bandwidth = "1MiB"
        """,
    )
    assert (config.browse, config.browse_ttl, config.browse_timeout) == (True, 300, 3)
    fetch = fetch_settings(config, chunks=None, env={"TOKEN": "hunter2\n"})
    assert fetch.headers == (("Authorization", "Bearer hunter2"),)
    assert (fetch.retry, fetch.retry_delay, fetch.timeout) == (7, 0.1, 12)
    assert (fetch.connect_timeout, fetch.stall_timeout) == (3, 9)
    assert (fetch.proxy, fetch.ca_file) == ("http://proxy.example.com:3128", "/etc/ssl/own.pem")
    assert (fetch.private_hosts, fetch.trusted_keys) == (("mirror.lan",), (KEY,))
    engine = engine_settings(config, fetch, mounted=True)
    assert (engine.fill, engine.policy, engine.read_timeout, engine.workers) == (
        FillMode.ALL,
        Policy.STRICT,
        60,
        2,
    )
    assert (engine.readahead_bytes, engine.commit_bytes, engine.commit_seconds) == (2**25, 2**23, 0.5)
    assert (engine.limits.max_jobs, engine.limits.max_retries) == (8, 7)
    assert engine.limits.background_jobs < engine.limits.max_jobs
    assert engine.bandwidth == Timetable(((8 * 60, 2 * MIB), (18 * 60, None)))
    assert engine.host_bandwidth == (("mirror.lan", Timetable(((0, MIB),))),)
    assert config.cache == Path("~/models-cache").expanduser()
    assert config.mirror == (
        MirrorRule(prefix="https://models.example.com/", url="http://mirror.lan/models/"),
    )


def test_every_key_has_a_variable_and_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for key in keys_of(Config):
        assert f"`{key}`" in text, f"{key} is not in docs/configuration.md"
        assert variable_of(key).startswith("WEIGHTFS_")


@pytest.mark.parametrize(
    "value",
    ['"1KiB"', '"08:00,2MiB 8:00,off"', '"25:00,2MiB"', '"08:00,fast"', '"08:00"', '""', "true", "1.5", '"-1"',
     '"' + " ".join(f"{n // 60}:{n % 60:02},off" for n in range(49)) + '"'],
)  # fmt: skip
def test_a_bandwidth_that_is_none_says_how_it_is_written(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"bandwidth: .*(MiB|KiB)"):
        load_text(tmp_path, f"bandwidth = {value}")


def test_a_host_has_one_table(tmp_path: Path) -> None:
    table = '[[host]]\nname = "a.lan"\nbandwidth = "1MiB/s"\n'
    assert load_text(tmp_path, table).host[0].bandwidth == "1MiB/s"
    with pytest.raises(ConfigError, match=r"a\.lan has two tables"):
        load_text(tmp_path, table + table.replace("a.lan", "A.lan"))


def test_an_option_beats_a_variable_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    text = "retry = 1\ntimeout = 1\nmax-jobs = 1\n"
    config = load_text(tmp_path, text, {"retry": "3"}, WEIGHTFS_RETRY="2", WEIGHTFS_TIMEOUT="2s")
    assert (config.retry, config.timeout, config.max_jobs, config.stall_timeout) == (3, 2, 1, 30)


def test_a_list_higher_up_replaces_the_one_below(tmp_path: Path) -> None:
    config = load_text(tmp_path, 'private-hosts = ["a", "b"]', WEIGHTFS_PRIVATE_HOSTS="c\n d \n")
    assert config.private_hosts == ("c", "d")


def test_an_empty_variable_is_none(tmp_path: Path) -> None:
    assert load_text(tmp_path, "", WEIGHTFS_RETRY="", WEIGHTFS_FILL=" ").retry is None


def test_headers_of_the_environment(tmp_path: Path) -> None:
    config = load_text(tmp_path, "", WEIGHTFS_HEADER="X-One: 1\nX-Two: a: b")
    assert [rule.resolve({}) for rule in config.header] == [("X-One", "1"), ("X-Two", "a: b")]


def test_where_the_file_is(tmp_path: Path) -> None:
    system = tmp_path / "etc.toml"
    env = {"HOME": str(tmp_path)}
    assert find_file(None, env, system=system) is None
    system.write_text("")
    assert find_file(None, env, system=system) == system
    user = tmp_path / ".config" / "weightfs" / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text("")
    assert find_file(None, env, system=system) == user
    assert find_file(None, {**env, "XDG_CONFIG_HOME": "/nowhere"}, system=system) == system
    assert find_file(None, {**env, "WEIGHTFS_CONFIG": "/named"}, system=system) == Path("/named")
    assert find_file(Path("/given"), {**env, "WEIGHTFS_CONFIG": "/named"}) == Path("/given")


def test_where_the_cache_is() -> None:
    assert default_cache({"HOME": "/home/me"}) == Path("/home/me/.cache/weightfs")
    assert default_cache({"HOME": "/home/me", "XDG_CACHE_HOME": "/c"}) == Path("/c/weightfs")
    assert default_cache({"HOME": "/home/me", "XDG_CACHE_HOME": "relative"}) == Path(
        "/home/me/.cache/weightfs"
    )
    assert default_cache({"CACHE_DIRECTORY": "/var/cache/weightfs:/other"}) == Path("/var/cache/weightfs")


def test_relative_paths_belong_to_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load({"cache": "c", "ca-file": "ca.pem", "log-file": "l"}, env={"HOME": "/"}, file=None)
    assert (config.cache, config.ca_file, config.log_file) == (
        tmp_path / "c",
        tmp_path / "ca.pem",
        tmp_path / "l",
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "read-timout = 1",
            "config.toml: unknown key 'read-timout'; the nearest known one is 'read-timeout'",
        ),
        ("read_timeout = 1", "the nearest known one is 'read-timeout'"),
        ("[[mirror]]\nprefx = 'x'", "unknown key 'mirror[1].prefx'; the nearest known one is 'prefix'"),
        (
            "[[header]]\nname='a'\nvalue='b'\n[[header]]\nvalues='c'",
            "'header[2].values'; the nearest known one is 'value'",
        ),
        ("retry = -1", "config.toml: retry: must be a whole number from 0 to 1000"),
        ("retry = true", "retry: must be a whole number"),
        ("retry = 1.5", "retry: must be a whole number"),
        ("read-timeout = 'soon'", "read-timeout: 'soon' is not a duration; write seconds, or for example"),
        ("read-timeout = 0.5", "read-timeout: must be from 1.0s to 720h, or 0 for no bound"),
        ("read-timeout = nan", "read-timeout: must be from"),
        ("timeout = inf", "timeout: must be from"),
        ("timeout = 0", "timeout: must be from 0.1s to 1h"),
        ("timeout = []", "timeout: must be a duration"),
        ("readahead = '1kB'", "readahead: must be from 1.0 MiB to 1.0 GiB"),
        ("readahead = '64M'", "readahead: '64M' is not a size"),
        ("readahead = 1.5", "readahead: must be a size"),
        ("fill = 'some'", "fill: must be 'never', 'opened' or 'all'"),
        ("policy = 'loose'", "policy: must be 'strict', 'provisional' or 'hold'"),
        ("allow-other = 'maybe'", "allow-other: must be true or false"),
        ("passthrough = 'maybe'", "passthrough: must be true or false"),
        (
            "metrics-listen = '192.168.1.2:9637'",
            "metrics-listen: '192.168.1.2:9637' is not on this machine's loopback",
        ),
        ("metrics-listen = 9637", "metrics-listen: must be"),
        ("metrics-listen = '127.0.0.1'", "is not an address and a port"),
        ("metrics-listen = '127.0.0.1:0'", "is not an address and a port"),
        ("metrics-listen = '127.0.0.1:65536'", "is not an address and a port"),
        ("metrics-listen = '127.0.0.1:+80'", "is not an address and a port"),
        ("metrics-listen = '::1:9637'", "is not an address and a port"),
        ("metrics-listen = '[127.0.0.1]:9637'", "is not an address and a port"),
        ("refs = 'https://h/m'", "refs: must be a list"),
        ("header = 'A: b'", "header: must be a list"),
        ("header = ['A: b']", "header[1]: must be a table"),
        ("[[header]]\nname = 'A b'\nvalue = 'c'", "header[1].name: 'A b' is not the name of an HTTP header"),
        ("[[header]]\nname = 'Range'\nvalue = 'c'", "the header Range belongs to weightfs"),
        (
            "[[header]]\nname = 'A'",
            "header[1]: a header needs exactly one of value, value-env and value-file",
        ),
        ("[[header]]\nname = 'A'\nvalue = 'b'\nvalue-env = 'C'", "exactly one of"),
        ("[[header]]\nname = 'A'\nvalue = \"b\\r\\nC: d\"", "printable ASCII on one line"),
        ("[[mirror]]\nprefix = 'https://h/'", "mirror[1].url is missing; add it"),
        (
            "[[mirror]]\nprefix = 'file:///x'\nurl = 'http://h/'",
            "mirror[1].prefix: 'file:///x' is not an http:// or",
        ),
        ("trusted-keys = ['RWQ']", "trusted-keys[1]: 'RWQ' is not a minisign public key"),
        (
            "trusted-keys = ['/no/such.pub']",
            "the key file /no/such.pub cannot be read: No such file or directory",
        ),
        ("browse = 'maybe'", "browse: must be true or false"),
        ("browse-ttl = 0", "browse-ttl: must be from 1.0s to 24h"),
        ("browse-timeout = '1h'", "browse-timeout: must be from 0.1s to 10m"),
        ("hf-endpoint = 'hub.lan'", "hf-endpoint: 'hub.lan' is not the URL of an API, such as"),
        ("hf-token = 'x'", "unknown key 'hf-token'; the nearest known one is 'hf-token-file'"),
        ("[[endpoint]]\nurl = 'http://h/'", "endpoint[1].host is missing; add it"),
        ("[[endpoint]]\nhost = 'h'\nuri = 'http://h/'", "'endpoint[1].uri'; the nearest known one is 'url'"),
        (
            "[[endpoint]]\nhost = 'https://h/'\nurl = 'http://h/'",
            "endpoint[1].host: 'https://h/' is not a registry's host as refs name it",
        ),
        (
            "[[endpoint]]\nhost = 'h'\nurl = 'http://h/?q=1'",
            "endpoint[1].url: 'http://h/' is not the URL of an API",
        ),
        (
            "[[endpoint]]\nhost='docker.io'\nurl='http://h'\n[[endpoint]]\nhost='INDEX.docker.io'\nurl='http://g'",
            "endpoint: the host docker.io has two endpoints; keep one of them",
        ),
        ("proxy = 'socks5://h:1'", "proxy: a proxy is written http://host:port"),
        # Regression: `config show` took what is before the sign for the host, and showed it.
        ("proxy = 'http://me:hunter2/3@h:1'", "proxy: a proxy is written http://host:port"),
        ("proxy = 'http://me:hunter2#3@h:1'", "/ ? # in a password as %2F %3F %23"),
        ("cache = ''", "cache: '' is not a path"),
        ("log-level = 'loud'", "log-level: must be 'debug', 'info', 'warning' or 'error'"),
        ("retry = ", "is not valid TOML"),
        ("a.b = 1\n[a]\n", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert str(tmp_path / "config.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_place_of_a_variable_and_of_an_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^WEIGHTFS_RETRY: must be"):
        load_text(tmp_path, "", WEIGHTFS_RETRY="many")
    with pytest.raises(ConfigError, match=r"^--retry: must be"):
        load_text(tmp_path, "", {"retry": "many"})
    with pytest.raises(ConfigError, match=r"^--trusted-key: 'x'"):
        load_text(tmp_path, "", {"trusted-keys": ["x"]})
    with pytest.raises(ConfigError, match=r"^WEIGHTFS_HEADER: a header is written") as caught:
        load_text(tmp_path, "", WEIGHTFS_HEADER="hunter2")
    assert "hunter2" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load({}, file=tmp_path / "none.toml", env={})
    with pytest.raises(ConfigError, match="Is a directory"):
        load({}, file=tmp_path, env={})
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="cannot be ours"):
        load({}, file=large, env={})
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load({}, file=binary, env={})


def test_a_header_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    rule = HeaderRule.model_validate({"name": "X", "value-file": str(secret)})
    assert rule.resolve({}) == ("X", "hunter2")
    secret.unlink()
    with pytest.raises(ConfigError, match="header X: the header file"):
        rule.resolve({})
    with pytest.raises(ConfigError, match="header X: the variable NONE is not set"):
        HeaderRule.model_validate({"name": "X", "value-env": "NONE"}).resolve({})


def test_a_key_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "minisign.pub"
    file.write_text(f"untrusted comment: minisign public key\n{KEY}\n")
    assert load_text(tmp_path, f"trusted-keys = ['{file}']").trusted_keys == (KEY,)
    file.write_text("untrusted comment: nothing\n")
    with pytest.raises(ConfigError, match="is not a minisign public key"):
        load_text(tmp_path, f"trusted-keys = ['{file}']")


def test_a_command_gives_up_where_a_mount_goes_on(tmp_path: Path) -> None:
    config = load_text(tmp_path, "")
    fetch = fetch_settings(config, chunks=None, env={})
    assert engine_settings(config, fetch, mounted=True).limits.max_retries is None
    assert engine_settings(config, fetch, mounted=False).limits.max_retries == fetch.retry


def test_a_chunk_list_is_for_one_ref(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_chunks(None, 3)
    check_chunks("x.meta4", 1)
    with pytest.raises(UsageError, match="one ref"):
        check_chunks("x.meta4", 2)
    monkeypatch.chdir(tmp_path)
    config = load_text(tmp_path, "")
    assert fetch_settings(config, chunks="x.meta4", env={}).chunks == str(tmp_path / "x.meta4")
    assert fetch_settings(config, chunks="https://h/x.meta4", env={}).chunks == "https://h/x.meta4"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(keys_of(Config)) | st.text(max_size=12), ANYTHING, max_size=4))
def test_any_table_is_a_config_or_one_sentence(values: dict[str, Any]) -> None:
    try:
        config = check(values, "/etc/x.toml")
    except ConfigError as error:
        assert str(error).startswith("/etc/x.toml")  # noqa: PT017  # either outcome is right
    else:
        assert 0 <= config.timeout <= 3600
        assert config.retry is None or 0 <= config.retry <= 1000


@given(st.floats(0.1, 3600))
def test_every_number_within_bounds_is_taken_as_it_is(seconds: float) -> None:
    assert check({"timeout": seconds}, "x").timeout == seconds
