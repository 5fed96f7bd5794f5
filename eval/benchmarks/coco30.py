"""LLaVA-Bench (COCO) of LLaVA v1: 30 images, 90 questions, judged with captions and boxes in view.

Judge: LLaVA eval_gpt_review_visual.py. The 85.1 % of LLaVA v1 is the relative score over all.
"""

from llava_jax.eval.benchmarks.llava_wild import LlavaWild


class Coco30(LlavaWild):
    name = "coco30"
    boxes = True
    prefix = ""
    files = ("qa90_questions.jsonl", "questions.jsonl", "*questions.jsonl")
    data_files = (
        "qa90_questions.jsonl, caps_boxes_coco2014_val_80.jsonl, qa90_gpt4_answer.jsonl, rule.json"
    )


TASK = Coco30()
