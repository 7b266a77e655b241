"""The DAG.

    prepare_data -> train_dense -> train_knockoff -> for each variant: select_channels -> finetune -> evaluate -> export
                                                     then compare

Each section of the configuration is a separate parameter and is passed only to the steps that use it, so KFP reruns a
cached step exactly if its section or an input has changed.
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
from components.image import IMAGE
from components.prepare_data.component import prepare_data
from components.select_channels.component import select_channels
from components.train_dense.component import train_dense
from components.train_knockoff.component import train_knockoff

NAME = "scop"


def make_pipeline(
    image: str = IMAGE,
    configure: Callable[[PipelineTask], object] = lambda task: None,
    parallelism: int = 1,
    defaults: Mapping[str, Any] | None = None,
) -> GraphComponent:
    """Return the pipeline.

    Args:
        image: the container image of all steps.
        configure: called with each task, to set its resources; see `pipelines.cluster.compilation`.
        parallelism: number of variants that run at the same time; by default one, since variants on the same machine
            would distort each other's latency.
        defaults: default values of the parameters, by name; parameters without one are required.
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
        """Train, score channels with knockoffs, prune, fine-tune, evaluate, export.

        Args:
            data: where the images come from.
            dense: the dense network and its training.
            knockoff: the knockoff phase.
            variants: the ways of pruning.
            finetune: training of the pruned networks.
            evaluate: how networks are measured.
            export: how networks are exported.
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
            task.set_container_image(image)
            configure(task)
        return compared.outputs["report"]

    if defaults is not None:
        scop_pipeline.__defaults__ = tuple(defaults[name] for name in inspect.signature(scop_pipeline).parameters)
    decorate = dsl.pipeline(name=NAME, description="Prune a convolutional network with scientific control (SCOP).")
    return decorate(scop_pipeline)


def compile_pipeline(path: str, pipeline: GraphComponent | None = None) -> None:
    """Write a pipeline as YAML; the same source always gives the same file.

    Args:
        path: path of the file.
        pipeline: the pipeline; by default that of `make_pipeline` without arguments.
    """
    compiler.Compiler().compile(pipeline or make_pipeline(), path)
