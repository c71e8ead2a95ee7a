# One rule a family, so that people can read the graph and give each family its resources. All do the same: hand a
# frozen job to Python and leave a receipt, the only kind of file Snakemake owns.


rule prepare:
    output:
        RUN.receipt("prepare"),
    message:
        "fetching models and data from the hub"
    params:
        command=RUN.command("workflows.prepare"),
    shell:
        "{params.command} {output:q}"


rule report:
    input:
        RUN.all_receipts(),
    output:
        RUN.receipt("report"),
    message:
        "drawing tables, figures and verdicts"
    params:
        command=RUN.command("workflows.collect"),
        settings=RUN.arguments,
    shell:
        "{params.command} {params.settings} && touch {output:q}"


rule model:
    input:
        lambda wildcards: RUN.needs(wildcards.id),
    output:
        RUN.pattern("model"),
    message:
        "{wildcards.id}: {params.label}"
    params:
        command=RUN.command("workflows.job"),
        label=lambda wildcards: RUN.label(wildcards.id),
    threads: lambda wildcards: RUN.threads(wildcards.id)
    resources:
        gpu=lambda wildcards: RUN.gpus(wildcards.id),
        mem_mb=lambda wildcards, attempt: RUN.memory_mb(wildcards.id, attempt),
        runtime=lambda wildcards, attempt: RUN.runtime_minutes(wildcards.id, attempt),
    shell:
        "{params.command} {wildcards.id:q} {output:q}"


use rule model as train with:
    output:
        RUN.pattern("train"),


use rule model as unlearn with:
    output:
        RUN.pattern("unlearn"),


use rule model as curvature with:
    output:
        RUN.pattern("curvature"),


use rule model as teacher with:
    output:
        RUN.pattern("teacher"),


use rule model as distill with:
    output:
        RUN.pattern("distill"),


use rule model as levels with:
    output:
        RUN.pattern("levels"),


use rule model as search with:
    output:
        RUN.pattern("search"),


use rule model as prune with:
    output:
        RUN.pattern("prune"),


use rule model as data with:
    output:
        RUN.pattern("data"),


use rule model as runtime with:
    output:
        RUN.pattern("runtime"),


use rule model as evaluate with:
    output:
        RUN.pattern("evaluate"),
