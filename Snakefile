# Snakemake decides when and where a job runs; workflows/plan.py decides what is missing and what it means.
#
#   snakemake --cores 2                                     the embedded experiment `tiny`
#   snakemake --cores 2 --config experiment=tofu_local data=DIR results=DIR
#   snakemake --cores 2 --config experiment=tofu_llama_1b scale=smoke
#   snakemake -n                                            what would run
from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from workflows import invocation

min_version("9.0")

try:
    RUN = invocation.Invocation.open(config, main=workflow.is_main_process, cores=workflow.cores)
except invocation.AssayError as error:
    raise WorkflowError(str(error)) from None

workflow.resource_scopes["gpu"] = "local"
if RUN.cards:
    workflow.global_resources.setdefault("gpu", RUN.cards)


localrules:
    all,
    prepare,
    report,


rule all:
    input:
        RUN.receipt("report"),
    default_target: True


include: "workflows/jobs.smk"


onstart:
    try:
        RUN.begin()
    except invocation.AssayError as error:
        raise WorkflowError(str(error)) from None


onsuccess:
    RUN.end()


onerror:
    RUN.end(report=True)
