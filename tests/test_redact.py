"""Secrets are found wherever they stand in a text, plain or percent-encoded; what is no secret stays; nothing acts."""

import pytest

from tinyclip.data.spec import DataSpec, from_file
from tinyclip.redact import SPEC_KEYS, has_secrets, redacted, visible


@pytest.mark.parametrize(
    "text, shown",
    [
        ("s3://me:KEY@bucket/{0..3}.tar?limit=3", "s3://bucket/{0..3}.tar?limit=3"),
        ("https://KEY@host/1.tar", "https://host/1.tar"),
        ("https:/me:KEY@host/1.tar?KEY", "https:/host/1.tar"),
        ("https://me:K/E@Y@host/1.tar", "https://host/1.tar"),
        ("filecache::https://me:KEY@host/1.tar", "filecache::https://host/1.tar"),
        ("https://host/1.tar?X-Amz-Expires=9&X-Amz-Signature=KEY", "https://host/1.tar"),
        ("https://host/1.tar?limit=3&anything=KEY", "https://host/1.tar"),
        ("https://host/1.tar%3Fsig=KEY%26se=KEY?limit=3", "https://host/1.tar?limit=3"),
        ("https://host/1.tar?KEY", "https://host/1.tar"),
        ("https%3A%2F%2Fme%3AKEY%40host%2F1.tar%3Fsig%3DKEY", "https%3A%2F%2Fhost%2F1.tar"),
        ("1.tar?anything=KEY/rose.jpg", "1.tar?anything=..."),
        ("pipe:curl -H 'X-Any: KEY' https://host/1.tar -o - | cat KEY", "pipe:..."),
        ("pipe%3Acurl%20KEY", "pipe:..."),
        ("--data=pipe:cat KEY\nKEY", "--data=pipe:..."),
        ("mixture?1=pipe:cat KEY%26KEY&2.5=s3://me:KEY@b/1.tar%253Fsig=KEY", "mixture?1=pipe:...&2.5=s3://b/1.tar"),
        ("mixture?1=pipe:sh -c 'a && b KEY'&2=scenes?count=3", "mixture?1=pipe:...&2=scenes?count=3"),
        ("403, url='https://host/1.tar?sig=KEY': no", "403, url='https://host/1.tar': no"),
        ("curl: (22) https://me:KEY@host/: refused", "curl: (22) https://host/: refused"),
        ("HF_TOKEN=KEY AWS_SECRET_ACCESS_KEY='KEY KEY' run", "HF_TOKEN=... AWS_SECRET_ACCESS_KEY=... run"),
        ("api_key%3DKEY%26other", "api_key%3D...%26other"),
        ("'Authorization: Basic KEY', sent", "'Authorization: ...', sent"),
        ("Authorization%3A%20Bearer%20KEY", "Authorization%3A%20..."),
        ("bearer KEY", "bearer ..."),
        ("x-api-key: KEY", "x-api-key: ..."),
        ("of hf_a1B2c3D4e5KEY there", "of ... there"),
        ("ghp_a1B2c3D4e5KEY", "..."),
    ],
)
def test_a_secret_is_left_out(text, shown):
    assert redacted(text) == shown and has_secrets(text)
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "a/pairs.tsv?images=i.zip&where=split=dev&caption=cats %26 {name}",
        "mixture?2=scenes?split=train%26count=30&1=scenes?split=classes",
        "hf://datasets/someone/set@main/1.tar",
        "http://host:8080/a@b/1.tar?window=2",
        "open_clip:ViT-B-32/laion2b_s34b_b79k",
        "image_to_text_recall@1: 40 %; image_tokens=0.5; tokenizer.json: expected hf_transfer or hf_hub_download",
        "expected a command behind pipe:, such as cat",
        "what? a=b; why?",
        "pipe:... 3: exit status 1: no",
        "C:/a//b, C:/a@b",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text and not has_secrets(text)


def test_values_are_cleaned_with_their_names_and_kinds():
    value = {
        "https://me:KEY@h/1.tar": ["token=KEY", ("a", 1, None)],
        "n": 2.5,
        "uri": "data:image/png;base64,token=KEY",
    }
    assert redacted(value) == {"https://h/1.tar": ["token=...", ("a", 1, None)], "n": 2.5, "uri": value["uri"]}


def test_what_stands_in_many_places_or_in_itself_is_cleaned_once():
    bomb: list = ["token=KEY"]
    for _ in range(100):
        bomb = [bomb, bomb]
    found = redacted(bomb)
    assert found[0] is found[1]
    for _ in range(100):
        found = found[0]
    assert found == ["token=..."]
    bomb[0] = bomb
    found = redacted(bomb)
    assert found[0] is found and from_file(bomb)[0] is bomb


def test_the_keys_of_a_spec_are_known():
    assert {*SPEC_KEYS, "path"} == set(DataSpec.model_fields)


def test_long_texts_are_read_in_time_that_grows_with_them():
    assert redacted("x" * 40_000 + "?a=b")
    for text in ("a-", "a://", "a?b=", "%25", "x", "a:", "//", "token", "pipe:"):
        assert len(redacted(text * 4000 + "@")) > 3


def test_what_acts_is_escaped_and_what_is_read_stays():
    assert visible("a\x1b[31m\r\n\x9b\u202eb\u2028\udc80") == r"a\x1b[31m\r\n\x9b\u202eb\u2028\udc80"
    assert visible("a\nb\t", keep="\n") == "a\nb\\t"
    for text in ("Wörter, 猫 [bold]", "👩\u200d🚀", "a\u00a0b"):
        assert visible(text) == text
