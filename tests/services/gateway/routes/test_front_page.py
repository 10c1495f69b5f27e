"""What the gateway's own URL shows: where everything is, to everybody, with nothing from elsewhere."""

import re

import httpx

from tests.services.gateway.conftest import ROWS, Gateway

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def test_a_browser_gets_a_page_whose_links_lead_somewhere(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url, trust_env=False) as anybody:
        page = anybody.get("/", headers=BROWSER)
        assert "GET / says" in anybody.get("/v1").json()["error"]["message"]
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        links = re.findall(r'href="([^"]*)"', page.text)
        assert len(links) > 2
        for link in links:
            assert link.startswith("/")
            assert anybody.get(link).status_code == 200, link
    assert "<script" not in page.text
    assert " src=" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert gateway.url + "/v1/chat/completions" in page.text
    assert gateway.key not in page.text


def test_curl_gets_json(gateway: Gateway) -> None:
    said = httpx.get(gateway.url, trust_env=False).json()
    assert (said["openai_base_url"], said["served"], said["ready"]) == (f"{gateway.url}/v1", [], True)
    for link in ("docs", "openapi", "health"):
        assert httpx.get(said[link], trust_env=False).status_code == 200
    assert httpx.get(said["metrics"], headers=gateway.http.headers, trust_env=False).status_code == 200


def test_a_host_header_cannot_write_into_the_page(gateway: Gateway) -> None:
    page = httpx.get(gateway.url, headers={**BROWSER, "host": '"><script>alert(1)</script>'}, trust_env=False)
    assert "<script" not in page.text


def test_a_json_body_that_is_said_to_be_a_form_is_told_which_header_is_missing(gateway: Gateway) -> None:
    """What curl sends with -d alone."""
    file = gateway.uploaded(ROWS)
    body = f'{{"model": "smollm2-135m-instruct", "training_file": "{file}"}}'
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}, {}):
        for path in ("/v1/fine_tuning/jobs", "/v1/fine_tuning/estimates"):
            answer = gateway.http.post(path, content=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_json"), answer.text
            assert "Content-Type: application/json" in answer.json()["error"]["message"]
        # What is passed on to inference is read as JSON whatever it is called.
        answer = gateway.http.post("/v1/chat/completions", content='{"model": "a"}', headers=headers)
        assert "messages" in answer.json()["error"]["message"]
