"""Let pipelines that share networks, and threads that share a pipeline, take turns."""

from ..common.threads import takes_turns

computes = takes_turns(lambda pipe: pipe.components.values())  # which other pipelines may hold too
learns = takes_turns(lambda pipe: [pipe])  # inspections go on meanwhile
