"""`GET /`: where one is, for whoever follows the URL that `tunesmith up` prints; a page for browsers, JSON for others.

Open to everybody, and says nothing that a key would protect. The page needs no script and nothing from elsewhere.
"""

from html import escape
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel

from services.gateway.routes.dependencies import HealthDep, ReplicasDep

router = APIRouter(tags=["operations"])
# Nothing is loaded or run, whatever a name in the page might hold.
_NOTHING_FOREIGN = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    "vary": "accept",
}


class FrontPageJson(BaseModel):
    """Where everything is.

    Attributes:
        served: ids of the bases that are served now.
    """

    name: Literal["Tunesmith gateway"] = "Tunesmith gateway"
    version: str
    openai_base_url: str
    docs: str
    openapi: str
    health: str
    metrics: str
    served: list[str]
    ready: bool
    key: str = "send 'Authorization: Bearer ts-…'; `tunesmith up` writes the key to connection.json in its home"


@router.get("/", response_model=FrontPageJson, responses={200: {"content": {"text/html": {}}}})
async def front_page(request: Request, replicas: ReplicasDep, health: HealthDep) -> Response:
    """Where the API, its documents and its health are: a page for browsers (`Accept: text/html`), else JSON."""
    root = str(request.base_url).rstrip("/")
    page = FrontPageJson(
        version=request.app.version,
        openai_base_url=f"{root}/v1",
        docs=f"{root}/docs",
        openapi=f"{root}/openapi.json",
        health=f"{root}/health/ready",
        metrics=f"{root}/metrics",
        served=replicas.served(),
        ready=(await health.check()).database,
    )
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(_html(page), headers=_NOTHING_FOREIGN)
    return JSONResponse(page.model_dump(), headers={"vary": "accept"})


def _html(page: FrontPageJson) -> str:
    url = escape(page.openai_base_url)
    served = ", ".join(f"<code>{escape(base)}</code>" for base in page.served) or "no base at the moment"
    model = escape(page.served[0]) if page.served else "…"
    state = "ready" if page.ready else "the database does not answer: <code>tunesmith logs gateway</code> says why"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tunesmith</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; padding: .8rem; border: 1px solid }}
</style>
</head>
<body>
<h1>Tunesmith {escape(page.version)}</h1>
<p>This is the gateway of a fine-tuning service: {state}. It serves {served}.</p>
<ul>
<li><a href="/docs">API, to try out</a> (<a href="/openapi.json">as a document</a>)</li>
<li><a href="/health/ready">Health</a></li>
<li>Metrics for Prometheus: <code>/metrics</code>, with the key</li>
<li>Base URL for OpenAI's clients: <code>{url}</code></li>
</ul>
<p>All but this page, its documents and the health needs the API key; <code>tunesmith up</code> writes it to
<code>.tunesmith/connection.json</code>. A first question:</p>
<pre>curl {url}/chat/completions \\
  -H "Authorization: Bearer $TUNESMITH_API_KEY" -H "Content-Type: application/json" \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'</pre>
</body>
</html>
"""
