"""The DAG.

    prepare_data -> train_dense -> train_knockoff -> for each variant: select_channels -> finetune -> evaluate -> export
                                                     then compare

Every section of the configuration is a parameter of its own, handed to nothing but the steps that depend on it, so that
a cached step is run again exactly when its section or an input changed.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Dict, List

from kfp import compiler, dsl
from kfp.dsl import PipelineTask
from kfp.dsl.graph_component import GraphComponent

from components.compare.component import compare
from components.evaluate.component import evaluate as evaluate_step
from components.export.component import export as export_step
from components.finetune.component import finetune as finetune_step
from components.prepare_data.component import prepare_data
from components.select_channels.component import select_channels
from components.train_dense.component import train_dense
from components.train_knockoff.component import train_knockoff

NAME = "scop"


def make_pipeline(
    place: Callable[[PipelineTask], object] = lambda task: None,
    parallelism: int = 1,
    defaults: Mapping[str, Any] | None = None,
) -> GraphComponent:
    """The pipeline.

    Args:
        place: called with each task, to say where it runs; see `pipelines.cluster.compilation`.
        defaults: of the parameters, by name; without, each must be given.
        parallelism: so many variants run at once. One by default: variants that ran side by side on one machine would
            spoil each other's latency figures.
    """

    def scop_pipeline(
        data: Dict[str, Any],
        dense: Dict[str, Any],
        knockoff: Dict[str, Any],
        variants: List[Dict[str, Any]],
        finetune: Dict[str, Any],
        evaluate: Dict[str, Any],
        export: Dict[str, Any],
    ) -> dsl.Artifact:
        """Train, compare with knockoffs, prune, fine-tune, measure, export.

        Args:
            data: where the images come from.
            dense: the network, and how it is trained.
            knockoff: the knockoff phase.
            variants: the ways of pruning to carry out.
            finetune: training of the pruned networks.
            evaluate: measuring.
            export: the deliverables.
        """
        prepared = prepare_data(data=data)
        dataset = prepared.outputs["dataset"]
        trained = train_dense(dense=dense, dataset=dataset)
        scored = train_knockoff(knockoff=knockoff, dataset=dataset, dense=trained.outputs["model"])
        with dsl.ParallelFor(variants, parallelism=parallelism) as variant:
            selected = select_channels(variant=variant, dense=trained.outputs["model"], scores=scored.outputs["scores"])
            tuned = finetune_step(
                finetune=finetune,
                variant=variant,
                dataset=dataset,
                dense=trained.outputs["model"],
                plan=selected.outputs["plan"],
            )
            measured = evaluate_step(
                evaluate=evaluate,
                variant=variant,
                dataset=dataset,
                dense=trained.outputs["model"],
                pruned=tuned.outputs["model"],
            )
            exported = export_step(
                export=export,
                variant=variant,
                dataset=dataset,
                pruned=tuned.outputs["model"],
                evaluation=measured.outputs["evaluation"],
            )
        compared = compare(
            scores=scored.outputs["scores"],
            evaluations=dsl.Collected(measured.outputs["evaluation"]),
            exports=dsl.Collected(exported.outputs["exported"]),
        )
        for task in (prepared, trained, scored, selected, tuned, measured, exported, compared):
            place(task)
        return compared.outputs["report"]

    if defaults is not None:
        scop_pipeline.__defaults__ = tuple(defaults[name] for name in inspect.signature(scop_pipeline).parameters)
    decorate = dsl.pipeline(name=NAME, description="Prune a convolutional network by scientific control (SCOP).")
    return decorate(scop_pipeline)


def compile_pipeline(path: str, pipeline: GraphComponent | None = None) -> None:
    """Write a pipeline, the plain one by default, as YAML; the same source always gives the same file."""
    compiler.Compiler().compile(pipeline or make_pipeline(), path)
