"""The box in the tab Teach that publishes an adaptation with the visitor's own sign-in."""

from __future__ import annotations

import re

import gradio as gr

from ..app import views
from .desk import Desk, Visit, sentences
from .space import is_space, local_token

_ON_SPACE = (
    "Sign in, and the adaptation goes to a repository of your own. That loads the page anew: your parts wait, and a "
    "button at its top brings them back."
)
_LOCALLY = (
    "On a Space you sign in here. On your own machine, start the app with `HF_TOKEN` set to a token with write "
    "access; only a browser on this machine can then publish."
)


def hub_box(desk: Desk, key: gr.State) -> None:
    """Builds the box."""
    with gr.Accordion("Publish on the Hugging Face Hub", open=False):
        gr.Markdown(_ON_SPACE if is_space() else _LOCALLY, elem_classes="help")
        if is_space():
            gr.LoginButton(elem_id="teach-login")
        with gr.Row():
            repo = gr.Textbox(label="Repository", placeholder="user/nut-adaptation", max_lines=1, elem_id="teach-repo")
            part = gr.Textbox(label="Part", info="Empty: the one taught last.", max_lines=1, elem_id="teach-push-part")
        private = gr.Checkbox(True, label="Private", elem_id="teach-private")
        exemplars = gr.Checkbox(
            True,
            label="With your good pictures",
            info="Repainting starts from them; without them the threshold has to be set anew.",
            elem_id="teach-push-pictures",
        )
        push = gr.Button("Publish the adaptation", elem_id="teach-push")
        said = gr.HTML(views.waiting("The address will appear here."), elem_id="teach-pushed")

    @sentences
    def on_space(key, repo, part, private, exemplars, request: gr.Request, token: gr.OAuthToken | None = None):
        if token is None:
            raise ValueError("You are not signed in; sign in with the button above, then publish.")
        return _publish(desk, desk.visit(key, request), repo, part, private, token.token, exemplars)

    @sentences
    def locally(key, repo, part, private, exemplars, request: gr.Request):
        forwarded = any(request.headers.get(name) for name in ("x-forwarded-for", "forwarded", "x-real-ip"))
        token = local_token(getattr(request.client, "host", None), forwarded)
        if token is None:
            raise ValueError(
                "There is no sign-in to publish with; start the app on this machine with `HF_TOKEN` set to a token "
                "with write access, or download the adaptation and use `anomalysd publish`."
            )
        return _publish(desk, desk.visit(key, request), repo, part, private, token, exemplars)

    push.click(
        on_space if is_space() else locally,
        [key, repo, part, private, exemplars],
        [key, said],
        api_visibility="private",
        preprocess=False,
        concurrency_limit=4,
        concurrency_id="publish",
    )


def _publish(desk: Desk, visit: Visit, repo: str, part: str, private: bool, token: str, exemplars: bool = True):
    from ..hub.publishing import push
    from .uploads import clean_text

    session = visit.session
    repo = clean_text(repo, "repository", 96, required=True)
    tuned = [name for name, held in session.parts.items() if held.taught]
    part = clean_text(part, "part", desk.limits.name_length) or (tuned[-1] if tuned else "")
    if part not in tuned:
        raise ValueError("There is no adaptation to publish; teach a part with Standard or Thorough first.")
    with session.in_use():
        folder = session.new_folder() / "adaptation"
        with desk.turns.turn():
            session.pipe.save_adaptation(folder, session.pipe.config.categories[part]["adaptation"], bool(exemplars))
        try:
            url = push(folder, repo, private=bool(private), token=token)
        except ValueError as error:
            # A library's message may hold the place on the server, or the token.
            text = str(error).replace(str(folder), "adaptation").replace(token, "***")
            raise ValueError(re.sub(r"hf_[A-Za-z0-9]+", "***", text)) from None
    return visit.key, views.verdict(f"Published “{part}”.", False, url)
