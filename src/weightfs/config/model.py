"""Every setting, its type, its bounds and its default: this file and docs/configuration.md say the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from weightfs.config.values import (
    Bandwidth,
    BaseUrl,
    HeaderName,
    HeaderValue,
    Host,
    HostPath,
    HttpUrl,
    ProxyUrl,
    RegistryHost,
    TrustedKey,
    check_header_value,
    count,
    read_small,
    seconds,
    size,
)
from weightfs.core.geometry import GIB, MAX_BLOB_SIZE, MIB
from weightfs.core.manifest import Policy
from weightfs.errors import ConfigError
from weightfs.logs import LogLevel

PIB = MAX_BLOB_SIZE
Timeout = Annotated[float, seconds(0.1, 3600)]


def kebab(name: str) -> str:
    """`read_timeout` → `read-timeout`."""
    return name.replace("_", "-")


class Section(BaseModel):
    """A table of the configuration file: kebab-case keys, nothing unknown."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=kebab, populate_by_name=False, hide_input_in_errors=True
    )


class HeaderRule(Section):
    """`[[header]]`: one HTTP header, its value in place, from a variable or from a file."""

    name: HeaderName
    value: HeaderValue | None = Field(default=None, repr=False)
    value_env: str | None = None
    value_file: HostPath | None = None
    prefix: str = ""

    @model_validator(mode="after")
    def _one_value(self) -> HeaderRule:
        if sum(given is not None for given in (self.value, self.value_env, self.value_file)) != 1:
            raise ValueError("a header needs exactly one of value, value-env and value-file")
        return self

    def resolve(self, env: Mapping[str, str]) -> tuple[str, str]:
        """Name and value. ConfigError if the variable is not set or the file cannot be read."""
        try:
            if self.value_env is not None:
                if self.value_env not in env:
                    raise ValueError(f"the variable {self.value_env} is not set")
                value = env[self.value_env]
            elif self.value_file is not None:
                value = read_small(self.value_file, "header")
            else:
                value = self.value or ""
            return self.name, check_header_value(self.prefix + value.strip())
        except ValueError as error:
            raise ConfigError(
                f"header {self.name}: {error}; set it, or take the header out of the configuration"
            ) from None


class MirrorRule(Section):
    """`[[mirror]]`: a blob whose URL begins with `prefix` can also be had at `url` plus the rest."""

    prefix: HttpUrl
    url: HttpUrl
    priority: Annotated[int, count(1, 999_999)] = 1  # RFC 5854 section 4.2.16.1


class EndpointRule(Section):
    """`[[endpoint]]`: the API of the registry that refs call `host` is reached at `url`."""

    host: RegistryHost
    url: BaseUrl


class HostRule(Section):
    """`[[host]]`: limits of one host that mirrors' URLs name."""

    name: Host
    bandwidth: Bandwidth


class Config(Section):
    """Every setting. Times in seconds, sizes in bytes."""

    # cache and mount
    cache: HostPath = Path()  # `load` puts the default in, which depends on the environment
    refs: tuple[str, ...] = Field(default=(), max_length=10_000)
    fill: Literal["never", "opened", "all"] = "opened"
    allow_other: bool = False
    passthrough: bool = True
    browse: bool = False
    browse_ttl: Annotated[float, seconds(1, 86_400)] = 60.0
    browse_timeout: Annotated[float, seconds(0.1, 600)] = 10.0
    read_timeout: Annotated[float, seconds(1, 30 * 86_400, zero=True)] = 600.0
    policy: Policy = Policy.PROVISIONAL
    trusted_keys: tuple[TrustedKey, ...] = Field(default=(), max_length=64)
    # limits of the cache
    max_size: Annotated[int, size(MIB, PIB)] | None = None
    min_free: Annotated[int, size(0, PIB)] | None = None  # None: 1 % of the filesystem, at most 1 GiB
    max_age: Annotated[float, seconds(60, 3650 * 86_400)] | None = None
    # fetching
    workers: Annotated[int, count(0, 64)] | None = None
    max_jobs: Annotated[int, count(1, 512)] = 32
    bandwidth: Bandwidth | None = None
    host: tuple[HostRule, ...] = Field(default=(), max_length=64)
    readahead: Annotated[int, size(MIB, GIB)] = 64 * MIB
    commit_size: Annotated[int, size(MIB, GIB)] = 16 * MIB
    commit_interval: Annotated[float, seconds(0.05, 60)] = 1.0
    # origins
    retry: Annotated[int, count(0, 1000)] | None = None
    retry_delay: Annotated[float, seconds(0.001, 300)] = 0.5
    timeout: Timeout = 30.0
    connect_timeout: Annotated[float, seconds(0.1, 600)] = 10.0
    stall_timeout: Timeout = 30.0
    proxy: ProxyUrl | None = Field(default=None, repr=False)  # may hold a password
    ca_file: HostPath | None = None
    private_hosts: tuple[Host, ...] = Field(default=(), max_length=1000)
    header: tuple[HeaderRule, ...] = Field(default=(), max_length=64)
    mirror: tuple[MirrorRule, ...] = Field(default=(), max_length=64)
    hf_endpoint: BaseUrl | None = None
    hf_token_file: HostPath | None = None
    registry_auth_file: HostPath | None = None
    endpoint: tuple[EndpointRule, ...] = Field(default=(), max_length=64)
    # logging
    log_level: LogLevel | None = None  # a mount says more than a command
    log_json: bool = False
    log_file: HostPath | None = None

    @field_validator("endpoint")
    @classmethod
    def _each_host_once(cls, rules: tuple[EndpointRule, ...]) -> tuple[EndpointRule, ...]:
        hosts = [rule.host for rule in rules]
        if twice := next((host for host in hosts if hosts.count(host) > 1), None):
            raise ValueError(f"the host {twice} has two endpoints; keep one of them")
        return rules

    @field_validator("host")
    @classmethod
    def _each_limit_once(cls, rules: tuple[HostRule, ...]) -> tuple[HostRule, ...]:
        names = [rule.name for rule in rules]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the host {twice} has two tables; keep one of them")
        return rules


SECTIONS: dict[str, type[Section]] = {
    "header": HeaderRule,
    "mirror": MirrorRule,
    "endpoint": EndpointRule,
    "host": HostRule,
}


def keys_of(section: type[Section]) -> list[str]:
    """Every key that may stand in a section, sorted."""
    return sorted(kebab(name) for name in section.model_fields)
