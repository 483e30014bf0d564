// The sigmoid router: which experts a token goes to, and with which weights (spec section 1.3).
#pragma once

#include "model.h"

namespace glm {

// Experts of all but the best `groups_kept` groups can no longer be chosen; a group's score is the sum of its two best.
static void drop_groups(const Config& c, std::vector<float>& choice) {
  thread_local std::vector<float> group_score;
  const int size = c.experts / c.groups;
  group_score.assign(c.groups, 0.f);
  for (int g = 0; g < c.groups; g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; e++) {
      if (choice[e] > first) {
        second = first;
        first = choice[e];
      } else if (choice[e] > second) {
        second = choice[e];
      }
    }
    group_score[g] = size > 1 ? first + second : first;
  }
  for (int dropped = c.groups_kept; dropped < c.groups; dropped++) {
    int worst = -1;
    for (int g = 0; g < c.groups; g++)
      if (!std::isinf(group_score[g]) && (worst < 0 || group_score[g] <= group_score[worst])) worst = g;
    if (worst < 0) break;
    group_score[worst] = INFINITY;  // never the worst again
    std::fill_n(choice.begin() + worst * size, size, -INFINITY);
  }
}

// score: a row's logits [experts], which become their sigmoids. chosen, weight [top_k]: best first; a tie goes to the
// lower index.
static void choose_experts(const Config& c, const float* bias, float* score, int64_t* chosen, float* weight) {
  thread_local std::vector<float> choice;
  choice.resize(c.experts);
  for (int e = 0; e < c.experts; e++) {
    score[e] = 1.f / (1.f + std::exp(-score[e]));
    choice[e] = score[e] + bias[e];
  }
  if (c.groups_kept < c.groups) drop_groups(c, choice);
  float total = 0.f;
  for (int k = 0; k < c.top_k; k++) {
    int best = -1;
    for (int e = 0; e < c.experts; e++) {
      bool taken = std::find(chosen, chosen + k, e) != chosen + k;
      if (!taken && (best < 0 || choice[e] > choice[best])) best = e;
    }
    chosen[k] = best;
    weight[k] = score[best];
    total += score[best];
  }
  for (int k = 0; k < c.top_k; k++) {
    if (c.normalize) weight[k] /= total + 1e-20f;
    weight[k] *= static_cast<float>(c.scale);
  }
}

}  // namespace glm
