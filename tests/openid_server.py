"""A place to sign in on this machine: what a Space's app asks of Hugging Face's OpenID Connect provider."""

import base64
import json
import secrets
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwk, jwt

from .local_server import LocalServer


class OpenIdServer(LocalServer):
    """`with OpenIdServer(token) as provider:` asks visitors at `provider.url` whether an app may act for them.

    Args:
        token: the access token that the app gets for a visitor who agrees.

    Attributes:
        client: the id and the secret by which the app is known.
        asked: the scopes that visitors were asked for, in order.
    """

    user, client = "user", ("app-id", "app-secret")

    def __init__(self, token: str):
        self.token, self.asked = token, []
        self.key = jwk.RSAKey.generate_key(2048, {"kid": "signing", "use": "sig", "alg": "RS256"})
        self.agreed: dict[str, dict[str, str]] = {}
        super().__init__(_Handler, "provider")

    def environment(self, scopes: str) -> dict[str, str]:
        """The variables that a Space with `hf_oauth: true` has."""
        return {
            "OAUTH_CLIENT_ID": self.client[0],
            "OAUTH_CLIENT_SECRET": self.client[1],
            "OAUTH_SCOPES": scopes,
            "OPENID_PROVIDER_URL": self.url,
        }

    def identity(self, nonce: str) -> str:
        """The signed statement who the visitor is."""
        now = int(time.time())
        claims = {"iss": self.url, "aud": self.client[0], "sub": "1", "iat": now, "exp": now + 3600, "nonce": nonce}
        claims |= {"name": "A User", "preferred_username": self.user, "profile": self.url, "picture": self.url}
        return jwt.encode({"alg": "RS256", "kid": "signing"}, claims, self.key)


class _Handler(BaseHTTPRequestHandler):
    provider: OpenIdServer

    def log_message(self, *_) -> None:
        pass

    def _send(self, status: int, content: str, kind: str = "application/json", **headers: str) -> None:
        data = content.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        url, path = self.provider.url, urlsplit(self.path)
        if path.path == "/.well-known/openid-configuration":
            places = {"authorization": "authorize", "token": "token"}
            found = {f"{name}_endpoint": f"{url}/{place}" for name, place in places.items()}
            self._send(200, json.dumps({"issuer": url, "jwks_uri": f"{url}/jwks", **found}))
        elif path.path == "/jwks":
            self._send(200, json.dumps({"keys": [self.provider.key.as_dict(private=False)]}))
        elif path.path == "/authorize":
            self._authorize({name: values[0] for name, values in parse_qs(path.query).items()})
        else:
            self._send(404, "{}")

    def _authorize(self, asked: dict[str, str]) -> None:
        """Asks the visitor, whose answer goes back to the app as a code."""
        if asked["client_id"] != self.provider.client[0] or asked["response_type"] != "code":
            self._send(400, "{}")
            return
        code = secrets.token_urlsafe()
        self.provider.agreed[code] = asked
        self.provider.asked.append(asked["scope"])
        back = asked["redirect_uri"]
        back += ("&" if "?" in back else "?") + urlencode({"code": code, "state": asked["state"]})
        page = f'<a id="agree" href="{back.replace("&", "&amp;")}">Authorize</a>'
        self._send(200, page, "text/html")

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        known = base64.b64encode(":".join(self.provider.client).encode()).decode()
        asked = self.provider.agreed.pop(form.get("code", [""])[0], None)  # a code is good once
        if self.path != "/token" or self.headers.get("Authorization") != f"Basic {known}" or asked is None:
            self._send(401, json.dumps({"error": "invalid_grant"}))
        elif form["redirect_uri"][0] != asked["redirect_uri"]:
            self._send(400, json.dumps({"error": "invalid_grant"}))
        else:
            answer = {"access_token": self.provider.token, "token_type": "bearer", "expires_in": 3600}
            answer |= {"scope": asked["scope"], "id_token": self.provider.identity(asked["nonce"])}
            self._send(200, json.dumps(answer))
