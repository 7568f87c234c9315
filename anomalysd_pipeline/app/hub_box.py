"""The box in the tab Teach that publishes an adaptation with the visitor's own sign-in."""

from __future__ import annotations

import re

import gradio as gr

from ..app import views
from .desk import Desk, Visit, sentences
from .fields import Faults, about
from .space import is_space, local_token

_ON_SPACE = (
    "Sign in, and the adaptation goes to a repository of your own. That loads the page anew: your parts wait, and a "
    "button at its top brings them back."
)
_LOCALLY = (
    "On a Space you sign in here. On your own machine, start the app with `HF_TOKEN` set to a token with write "
    "access; only a browser on this machine can then publish."
)


def hub_box(desk: Desk, key: gr.State, taught: gr.HTML) -> None:
    """Builds the box.

    Args:
        desk: gives sessions and turns.
        key: state that holds the key of the page's session.
        taught: what is said of the latest lesson; a new one empties the places of errors here.
    """
    faults = Faults()
    with gr.Accordion("Publish on the Hugging Face Hub", open=False):
        gr.Markdown(_ON_SPACE if is_space() else _LOCALLY, elem_classes="help")
        if is_space():
            gr.LoginButton(elem_id="teach-login")
        with gr.Row():
            with gr.Column(min_width=300):
                repo = gr.Textbox(
                    label="Repository",
                    info="Made if there is none yet.",
                    placeholder="user/nut-adaptation",
                    max_lines=1,
                    elem_id="teach-repo",
                )
                faults.beside("repository", repo)
            with gr.Column(min_width=300):
                part = gr.Textbox(
                    label="Part", info="Empty: the one taught last.", max_lines=1, elem_id="teach-push-part"
                )
                faults.beside("part", part)
        private = gr.Checkbox(True, label="Private", elem_id="teach-private")
        exemplars = gr.Checkbox(
            True,
            label="With your good pictures",
            info="Repainting starts from them; without them the threshold has to be set anew.",
            elem_id="teach-push-pictures",
        )
        push = gr.Button("Publish the adaptation", elem_id="teach-push")
        faults.beside("publication", push)
        said = gr.HTML(views.waiting("The address will appear here."), elem_id="teach-pushed")

    def answered(key_value, repo, part, private, exemplars, request, token: str | None, remedy: str) -> dict:
        """Publishes, and says what is wrong beside its field."""
        visit = desk.visit(key_value, request)
        try:
            with about("publication"):
                if token is None:
                    raise ValueError(remedy)
                told = _publish(desk, visit, repo, part, private, token, exemplars)
        except ValueError as error:
            return {key: visit.key, said: views.waiting("Not published."), **faults.said(error)}
        return {key: visit.key, said: told, **faults.none()}

    @sentences
    def on_space(key, repo, part, private, exemplars, request: gr.Request, token: gr.OAuthToken | None = None):
        remedy = "You are not signed in; sign in with the button above, then publish."
        own = None if token is None else token.token
        return answered(key, repo, part, private, exemplars, request, own, remedy)

    @sentences
    def locally(key, repo, part, private, exemplars, request: gr.Request):
        forwarded = any(request.headers.get(name) for name in ("x-forwarded-for", "forwarded", "x-real-ip"))
        token = local_token(getattr(request.client, "host", None), forwarded)
        remedy = (
            "There is no sign-in to publish with; start the app on this machine with `HF_TOKEN` set to a token with "
            "write access, or download the adaptation and use `anomalysd publish`."
        )
        return answered(key, repo, part, private, exemplars, request, token, remedy)

    push.click(
        on_space if is_space() else locally,
        [key, repo, part, private, exemplars],
        [key, said, *faults.outputs],
        api_visibility="private",
        preprocess=False,
        concurrency_limit=4,
        concurrency_id="publish",
    )
    taught.change(None, None, faults.outputs, js=f"() => {[''] * len(faults.outputs)}")


def _publish(desk: Desk, visit: Visit, repo: str, part: str, private: bool, token: str, exemplars: bool = True) -> str:
    """Publishes a part; returns the words for it, as HTML."""
    from ..hub.publishing import push
    from .uploads import clean_text

    session = visit.session
    repo = clean_text(repo, "repository", 96, required=True)
    tuned = [name for name, held in session.parts.items() if held.taught]
    part = clean_text(part, "part", desk.limits.name_length) or (tuned[-1] if tuned else "")
    if part not in tuned:
        known = f"one of {', '.join(map(repr, tuned))}" if tuned else "fine-tuned: teach it with Standard or Thorough"
        raise ValueError(f"`part` must be {known}.")
    with session.in_use():
        folder = session.new_folder() / "adaptation"
        with desk.turns.turn():
            session.pipe.save_adaptation(folder, session.pipe.config.categories[part]["adaptation"], bool(exemplars))
        try:
            url = push(folder, repo, private=bool(private), token=token)
        except ValueError as error:
            # A library's message may hold the place on the server, or the token.
            text = (
                str(error)
                .replace("`repo_id`", "`repository`")
                .replace(str(folder), "adaptation")
                .replace(token, "***")
            )
            raise ValueError(re.sub(r"hf_[A-Za-z0-9]+", "***", text)) from None
    return views.verdict(f"Published “{part}”.", False, url)
