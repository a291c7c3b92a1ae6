// Scores of a token from its logits, met one tile of the vocabulary at a time.
#pragma once
#include <cstdint>

#include "level.h"

namespace pyeff {

// What a row remembers of the logits it has met, target left out: with z the (capped) logits and d = dz/dx,
//     peak = max z, s1 = sum e^(z - peak), s2 = sum e^(2 (z - peak)), zs1 = sum (z - peak) e^(z - peak),
//     sd2 = sum (d e^(z - peak))^2,
// and the target's own z and d. Keeping the target apart is what keeps 1 - p_y exact where p_y is near 1.
struct alignas(32) ScoreState {
    float peak, s1, s2, zs1, sd2;
    float target_logit, target_slope;
};

// Which scores come out, in this order.
enum Score { NLL, LSE, ENTROPY, EL2N, MARGIN, P_TARGET, HEAD_GRAD_NORM, SCORES };

}  // namespace pyeff

// meet_logits: takes in logits [rows, columns] (overwritten), those of the classes from first_class on.
//     bias [columns] may be null; softcap 0 means none. The first tile (first_class 0) starts the state.
// finish_scores: writes scores [SCORES, rows], score s of row i at scores[s * score_stride + i].
PYEFF_DECLARE(void meet_logits(float* logits, int64_t rows, int64_t columns, int64_t first_class,
                               const int64_t* targets, const float* bias, float softcap, ScoreState* states,
                               int threads);
              void finish_scores(const ScoreState* states, const float* hidden_norms, int64_t rows, bool one_class,
                                 float* scores, int64_t score_stride))
