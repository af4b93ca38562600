"""Pipelines that find and answer."""

from haystack import Pipeline

from tests.rag.rags import QUESTION

ANSWER = {"max_new_tokens": 8}


def asked(pipeline, **more):
    data = {"query": QUESTION} | more
    return pipeline.run({"retriever": {"query": QUESTION}, "generator": data})["generator"]


def joined(retriever, generator):
    pipeline = Pipeline()
    pipeline.add_component("retriever", retriever)
    pipeline.add_component("generator", generator)
    pipeline.connect("retriever.documents", "generator.documents")
    return pipeline
