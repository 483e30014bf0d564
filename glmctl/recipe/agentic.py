"""The recipe of agentic SFT data: tools, tasks, trajectories, judges. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glmctl.recipe.sections import RecipeBase, Section


class PythonTools(Section):
    """Functions of a Python module: signature and docstring become the declaration."""

    type: Literal["python"] = "python"
    module: str = Field(description="package.module, or a path ending in .py")
    functions: list[str] = Field([], description="empty = every public function of the module")


class OpenApiTools(Section):
    """Operations of an OpenAPI 3 document, called over HTTP."""

    type: Literal["openapi"] = "openapi"
    path: str = Field(description="a .json or .yaml file")
    base_url: str | None = Field(None, description="of the server; null = the document's first")
    operations: list[str] = Field([], description="operationIds; empty = all")
    api_key_env: str | None = Field(None, description="environment variable whose value is sent as bearer token")
    timeout_seconds: float = Field(30.0, gt=0.0)


class McpTools(Section):
    """Tools of a Model Context Protocol server (extra `mcp`), started by us or already serving HTTP."""

    type: Literal["mcp"] = "mcp"
    command: list[str] = Field([], description="starts a server that speaks over stdin and stdout")
    url: str | None = Field(None, description="of a server that speaks streamable HTTP")
    timeout_seconds: float = Field(30.0, gt=0.0)
    fresh: bool = Field(False, description="start the server anew for every trajectory: none finds another's traces")
    restarts: int = Field(3, ge=0, description="how often a server that died is connected to again")

    @model_validator(mode="after")
    def _one_way(self) -> McpTools:
        if bool(self.command) == (self.url is not None):
            raise ValueError("one of command and url is needed, and not both")
        if self.fresh and self.url is not None:
            raise ValueError("fresh: a server at a url is not ours to start")
        return self


class SimulatedTools(Section):
    """Declared tools without code behind them: the recipe's `simulator` makes up their results."""

    type: Literal["simulated"] = "simulated"
    path: str = Field(description="JSON list of tool declarations in OpenAI's shape")


class ProblemTools(Section):
    """Our own environments: tools, tasks and the verdict all come from problems with tools."""

    type: Literal["problems"] = "problems"
    paths: list[str] = Field(min_length=1, description="problem files")
    count: int = Field(gt=0)


ToolSource = Annotated[
    PythonTools | OpenApiTools | McpTools | SimulatedTools | ProblemTools, Field(discriminator="type")
]


class EndpointActor(Section):
    """A model behind an OpenAI-compatible server."""

    type: Literal["endpoint"] = "endpoint"
    url: str
    model: str
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the server's key")
    temperature: float = Field(0.7, ge=0.0, le=2.0)
    max_tokens: int = Field(2048, gt=0, description="of one turn")


class ModelActor(Section):
    """A model of ours in this process."""

    type: Literal["model"] = "model"
    model: str = Field(description="a model folder or run")
    temperature: float = Field(0.7, ge=0.0, le=2.0)
    max_tokens: int = Field(256, gt=0, description="of one turn")


class ScriptedActor(Section):
    """Follows the script that a task brings, for work without any model."""

    type: Literal["scripted"] = "scripted"


Actor = Annotated[EndpointActor | ModelActor | ScriptedActor, Field(discriminator="type")]
Speaker = Annotated[EndpointActor | ModelActor, Field(discriminator="type")]


class TaskSynthesis(Section):
    """Tasks that a model proposes after reading the declarations of some of the tools."""

    writer: Speaker
    single_step: int = Field(0, ge=0, description="tasks that one call solves")
    multi_step: int = Field(0, ge=0, description="tasks that need several calls")
    tools_per_request: int = Field(6, gt=0, description="tools that the writer is shown at once")
    per_request: int = Field(4, gt=0, description="tasks asked for at once")


class RulesJudge(Section):
    """Protocol, the calls that the task expects, its answer, the environment's verdict."""

    type: Literal["rules"] = "rules"


class ModelJudge(Section):
    """A model that reads task and trajectory and says whether the task was completed."""

    type: Literal["model"] = "model"
    judge: Speaker
    focus: str = Field("", description="what this judge is to look at in particular")


Judge = Annotated[RulesJudge | ModelJudge, Field(discriminator="type")]


class AgenticRecipe(RecipeBase):
    """Agentic SFT data in four steps: collect tools, make tasks, play trajectories, keep what all judges pass."""

    type: Literal["agentic"] = "agentic"
    tools: list[ToolSource] = Field(min_length=1)
    tasks: list[str] = Field([], description="JSON lines of {prompt, goal?, script?, expect?}")
    synthesis: TaskSynthesis | None = None
    teacher: Actor = ScriptedActor()
    user: Speaker | None = Field(
        None, description="plays the person; null = a task is one user message, or what its script says"
    )
    simulator: Speaker | None = Field(None, description="plays the tools of a `simulated` source")
    judges: list[Judge] = Field([RulesJudge()], min_length=1)
    samples_per_task: int = Field(1, gt=0)
    max_calls: int = Field(12, gt=0, description="most assistant turns between two user turns")
    user_turns: int = Field(4, gt=0, description="most user turns of a trajectory")
    enable_thinking: bool = True
    concurrency: int = Field(1, gt=0, description="trajectories at once, each with tools of its own")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> AgenticRecipe:
        kinds = {source.type for source in self.tools}
        if "simulated" in kinds and self.simulator is None:
            raise ValueError("a simulated tool source needs a `simulator`")
        if not self.tasks and self.synthesis is None and "problems" not in kinds:
            raise ValueError("tasks come from `tasks`, `synthesis` or a tool source of type problems; none is given")
        if self.synthesis is not None and not (self.synthesis.single_step or self.synthesis.multi_step):
            raise ValueError("synthesis: single_step and multi_step are both 0")
        return self
