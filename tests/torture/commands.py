"""The commands that are started, with everything that they import later."""

import eval.beir
import eval.evaluate
import eval.search
import retriever.encode
import retriever.outputs
import retriever.plan.report
import retriever.preflight
import retriever.run
import retriever.train
import retriever.verify
import scripts.mine_negatives

MAINS = {
    "train": retriever.train.main,
    "encode": retriever.encode.main,
    "search": eval.search.main,
    "beir": eval.beir.main,
    "mine": scripts.mine_negatives.main,
}
