"""MMBench-CN (dev 20231003): the same rules, Chinese questions and instruction."""

from llava_jax.eval.benchmarks.mmbench import MMBench


class MMBenchCN(MMBench):
    name = "mmbench_cn"
    data_files = "mmbench_dev_cn_20231003.tsv (images inside)"
    suffix = "\n请直接回答选项字母。"
    files = ("mmbench_dev_cn_*.tsv", "MMBench_DEV_CN*.tsv", "*.tsv")


TASK = MMBenchCN()
