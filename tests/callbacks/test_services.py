"""The requests of each service, as its documentation describes them."""

import json
import pickle

import pytest

from learnloop.callbacks.services import SERVICES, Discord, Ntfy, Slack, Telegram, Webhook

FIELDS = {"name": "toy", "event": "end"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("SERVER", "BOT_TOKEN", "CHAT_ID"):
        monkeypatch.delenv(f"TELEGRAM_{name}", raising=False)
    for name in ("SERVER", "TOKEN"):
        monkeypatch.delenv(f"NTFY_{name}", raising=False)
    return monkeypatch.setenv


def sent(service, text="it is done"):
    """Address, body and headers of its own."""
    request = service.request(text, FIELDS)
    assert request.get_method() == "POST" and request.get_header("Content-type") == "application/json"
    return request.full_url, json.loads(request.data), request.get_header("Authorization")


def test_a_webhook_gets_the_text_and_the_fields(environment):
    environment("WEBHOOK_URL", "http://here/hook")
    assert sent(Webhook()) == ("http://here/hook", {"text": "it is done", "name": "toy", "event": "end"}, None)


def test_slack_gets_text(environment):
    environment("SLACK_WEBHOOK_URL", "https://hooks.slack.com/services/T/B/x")
    assert sent(Slack()) == ("https://hooks.slack.com/services/T/B/x", {"text": "it is done"}, None)


def test_discord_gets_content_of_at_most_2000_characters(environment):
    environment("DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/1/x")
    assert sent(Discord(), "a" * 3000) == ("https://discord.com/api/webhooks/1/x", {"content": "a" * 2000}, None)


def test_telegram_gets_chat_and_text_of_at_most_4096_characters_from_the_bot(environment):
    environment("TELEGRAM_BOT_TOKEN", "1:x")
    environment("TELEGRAM_CHAT_ID", "-100")
    expected = {"chat_id": "-100", "text": "a" * 4096}
    assert sent(Telegram(), "a" * 5000) == ("https://api.telegram.org/bot1:x/sendMessage", expected, None)
    environment("TELEGRAM_SERVER", "http://here/")
    assert sent(Telegram())[0] == "http://here/bot1:x/sendMessage"


def test_ntfy_gets_topic_title_and_message_and_the_token_where_there_is_one(environment):
    environment("NTFY_TOPIC", "mine")
    message = {"topic": "mine", "title": "toy", "message": "it is done"}
    assert sent(Ntfy()) == ("https://ntfy.sh", message, None)
    environment("NTFY_TOKEN", "tk_x")
    environment("NTFY_SERVER", "http://here")
    assert sent(Ntfy()) == ("http://here", message, "Bearer tk_x")


def test_variables_have_other_names_where_one_says_so(environment):
    environment("MY_URL", " http://here ")
    assert sent(Slack("MY_URL"))[0] == "http://here"


@pytest.mark.parametrize("make", [Webhook, Slack, Discord, Telegram, Ntfy])
def test_a_secret_in_place_of_a_name_is_refused_and_not_repeated(make):
    with pytest.raises(ValueError, match=rf"`{make.__name__}\(.*=…\)` takes the name of an environment variable") as e:
        make("https://hooks/s3cret")
    assert "s3cret" not in str(e.value)


def test_what_must_be_set_is_missing_and_what_may_be_is_not(environment, monkeypatch):
    monkeypatch.delenv("NTFY_TOPIC", raising=False)
    assert (Telegram().missing(), Ntfy().missing()) == (["TELEGRAM_BOT_TOKEN", "TELEGRAM_CHAT_ID"], ["NTFY_TOPIC"])


def test_an_address_without_http_is_refused_and_not_repeated(environment):
    environment("WEBHOOK_URL", "ftp://s3cret")
    with pytest.raises(ValueError, match=r"^the address does not begin with http:// or https://$"):
        sent(Webhook())


def test_a_service_can_be_pickled_and_says_which_variables_it_reads():
    assert pickle.loads(pickle.dumps(Slack("MY_URL"))) == Slack("MY_URL")
    assert [repr(make()) for make in SERVICES.values()][1:3] == [
        "Slack(url='SLACK_WEBHOOK_URL')",
        "Discord(url='DISCORD_WEBHOOK_URL')",
    ]
