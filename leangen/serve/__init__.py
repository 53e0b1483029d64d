"""An edge server that speaks the OpenAI API, and says of every answer what it cost.

    leangen serve smollm2-135m:int4 piper-joe:int8 terrain:int8

`app` routes and `access` guards; `calls` hands a request to the `worker` of its model and sums the
receipts; a worker runs `jobs` through a `runners.Runner`: language models in a batch
(`leangen.families.batch`), the other families one after the other; `account` shares the joules.
The event loop never computes: each model has a thread of its own. The extra is `serve`.
"""
