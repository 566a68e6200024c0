"""Where messages go: the HTTP request of each service, with addresses and tokens from the environment."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import Request

__all__ = ["SERVICES", "Discord", "Ntfy", "Service", "Slack", "Telegram", "Webhook"]


@dataclass(frozen=True)
class Service:
    """A form of request. It holds names of environment variables, never what stands in them.

    A subclass has a field for each variable, whose default is the variable's usual name, and fills in `request`.
    """

    optional: ClassVar[tuple[str, ...]] = ()  # fields whose variables need not be set

    def __post_init__(self) -> None:
        for field in fields(self):
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(getattr(self, field.name))):
                raise ValueError(  # without repeating it: it may be the secret itself
                    f"`{type(self).__name__}({field.name}=…)` takes the name of an environment variable, such as "
                    f"`{field.default}`; what stands in it would stand in your code."
                )

    def missing(self) -> list[str]:
        """Variables that must be set and are not."""
        wanted = [getattr(self, field.name) for field in fields(self) if field.name not in self.optional]
        return [variable for variable in wanted if not os.environ.get(variable)]

    def request(self, text: str, more: Mapping[str, Any]) -> Request:
        """The request for a message; `more` are the fields of which its text was made."""
        raise NotImplementedError


def _value(variable: str, default: str = "") -> str:
    return os.environ.get(variable, "").strip() or default


@dataclass(frozen=True)
class Webhook(Service):
    """Any server: POST of JSON with `text` and all fields of the message."""

    url: str = "WEBHOOK_URL"

    def request(self, text: str, more: Mapping[str, Any]) -> Request:
        return _post(_value(self.url), {"text": text, **more})


@dataclass(frozen=True)
class Slack(Service):
    """An incoming webhook of Slack. Source: api.slack.com/messaging/webhooks."""

    url: str = "SLACK_WEBHOOK_URL"

    def request(self, text: str, more: Mapping[str, Any]) -> Request:
        return _post(_value(self.url), {"text": text})


@dataclass(frozen=True)
class Discord(Service):
    """A webhook of Discord, which takes 2,000 characters. Source: discord.com/developers/docs/resources/webhook."""

    url: str = "DISCORD_WEBHOOK_URL"

    def request(self, text: str, more: Mapping[str, Any]) -> Request:
        return _post(_value(self.url), {"content": text[:2000]})


@dataclass(frozen=True)
class Telegram(Service):
    """A bot of Telegram, which takes 4,096 characters. Source: core.telegram.org/bots/api#sendmessage."""

    optional = ("server",)
    token: str = "TELEGRAM_BOT_TOKEN"
    chat: str = "TELEGRAM_CHAT_ID"
    server: str = "TELEGRAM_SERVER"  # of your own

    def request(self, text: str, more: Mapping[str, Any]) -> Request:
        server = _value(self.server, "https://api.telegram.org").rstrip("/")
        address = f"{server}/bot{_value(self.token)}/sendMessage"
        return _post(address, {"chat_id": _value(self.chat), "text": text[:4096]})


@dataclass(frozen=True)
class Ntfy(Service):
    """A topic of ntfy.sh, or of a server of your own. Source: docs.ntfy.sh/publish."""

    optional = ("server", "token")
    topic: str = "NTFY_TOPIC"
    server: str = "NTFY_SERVER"  # another one than ntfy.sh
    token: str = "NTFY_TOKEN"

    def request(self, text: str, more: Mapping[str, Any]) -> Request:
        token = _value(self.token)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        message = {"topic": _value(self.topic), "title": str(more["name"]), "message": text}
        return _post(_value(self.server, "https://ntfy.sh"), message, headers)


def _post(address: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Request:
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError("the address does not begin with http:// or https://")
    data = json.dumps(body, default=str).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "learnloop", **(headers or {})}
    return Request(address, data, headers, method="POST")


#: The ready forms by the name that `Notify` takes.
SERVICES: dict[str, Callable[[], Service]] = {
    "webhook": Webhook,
    "slack": Slack,
    "discord": Discord,
    "telegram": Telegram,
    "ntfy": Ntfy,
}
