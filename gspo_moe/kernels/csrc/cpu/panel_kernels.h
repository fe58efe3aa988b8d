// Products of a few rows with weights in panels, and tokens drawn from logits, in float32, for token_kernels.h's
// instruction sets. A panel's outputs lie beside each other, so that a product adds up no lanes in the end and reads
// its weights from front to back.

namespace {

constexpr int kVectors = GSPO_PANEL / kLanes;   // of a panel
constexpr int kPanels = kLanes == 16 ? 4 : 1;   // of kPanelRows rows, for which registers are left
constexpr int kFewPanels = kLanes == 16 ? 4 : 2;  // of one or two rows
constexpr int kPanelRows = 6;

// Weights that will be needed next, fetched a few lines at a time: the processor foresees no page's begin.
struct Ahead {
  const char *next, *end;
  int64_t lines;  // every kStretch inputs

  inline __attribute__((always_inline)) void fetch() {
    for (int64_t line = 0; line < lines && next < end; ++line, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

constexpr int64_t kStretch = 8;

template <int kM, int kP>
GSPO_INLINE void panel_tile(const GspoPanels* args, int64_t row, int64_t panel, Ahead& ahead) {
  constexpr int kN = kP * kVectors;
  const int64_t inputs = args->inputs;
  const float* const weights_PKN = args->panels_PKN + panel * inputs * GSPO_PANEL;
  const float* rows[kM];
  for (int m = 0; m < kM; ++m) rows[m] = args->rows_M[row + m];
  Floats sums[kM * kN] = {};
  const auto add = [&](int64_t input) __attribute__((always_inline)) {
    Floats weights[kN];
    for (int n = 0; n < kN; ++n) {
      weights[n] = load<Floats>(weights_PKN + (n / kVectors * inputs + input) * GSPO_PANEL + n % kVectors * kLanes);
      GSPO_IN_REGISTER(weights[n]);
    }
    for (int m = 0; m < kM; ++m) {
      Floats value = all(rows[m][input]);
      GSPO_IN_REGISTER(value);
      for (int n = 0; n < kN; ++n) sums[m * kN + n] += value * weights[n];
    }
  };
  int64_t input = 0;
  for (; input + kStretch <= inputs; input += kStretch) {
    ahead.fetch();
    for (int64_t each = input; each < input + kStretch; ++each) add(each);
  }
  for (; input < inputs; ++input) add(input);
  const int64_t first = panel * GSPO_PANEL, left = args->outputs - first;
  for (int m = 0; m < kM; ++m) {
    float* const found = args->found_MN + (row + m) * args->found_stride + first;
    if (left >= kP * GSPO_PANEL) {
      for (int n = 0; n < kN; ++n) Float32::put(found + n * kLanes, sums[m * kN + n]);
    } else {
      float outputs[kP * GSPO_PANEL];
      for (int n = 0; n < kN; ++n) Float32::put(outputs + n * kLanes, sums[m * kN + n]);
      memcpy(found, outputs, sizeof(float) * left);
    }
  }
}

template <int kP>
GSPO_INLINE void panel_group(const GspoPanels* args, int64_t panel, int64_t last) {
  constexpr int kFull = kPanels < kP ? kPanels : kP;
  const int64_t rows = args->num_rows, whole = rows / kPanelRows * kPanelRows, fours = rows - whole >= 4 ? 4 : 0;
  const int64_t bytes = args->inputs * GSPO_PANEL * sizeof(float), more = last - panel - kP;
  const char* const next = (const char*)args->panels_PKN + (panel + kP) * bytes;
  const int64_t tiles = (whole / kPanelRows + fours / 4) * (kP / kFull) + (rows - whole - fours + 1) / 2;
  const int64_t stretches = args->inputs / kStretch * tiles;
  Ahead ahead = {next, next + (more < kP ? more : kP) * bytes, stretches ? (kP * bytes / 64 + stretches - 1) / stretches : 0};
  for (int p = 0; p < kP; p += kFull) {
    for (int64_t row = 0; row < whole; row += kPanelRows) panel_tile<kPanelRows, kFull>(args, row, panel + p, ahead);
    if (fours) panel_tile<4, kFull>(args, whole, panel + p, ahead);
  }
  int64_t row = whole + fours;
  for (; row + 2 <= rows; row += 2) panel_tile<2, kP>(args, row, panel, ahead);
  if (row < rows) panel_tile<1, kP>(args, row, panel, ahead);
}

void panels(const GspoPanels* args, int64_t first, int64_t last) {
  int64_t panel = first;
  for (; panel + kFewPanels <= last; panel += kFewPanels) panel_group<kFewPanels>(args, panel, last);
  for (; panel < last; ++panel) panel_group<1>(args, panel, last);
}

// A block of columns, of which the chosen one is searched in float64.
constexpr int64_t kDrawn = 256;

// The first column from `start` whose cumulative share exceeds `share` of the block; the last with a share where
// rounding leaves none.
int64_t column_of(const GspoDraw* args, const float* row, int64_t start, float max, double share) {
  float weights[kDrawn + kLanes];
  const int64_t count = args->vocab - start < kDrawn ? args->vocab - start : kDrawn;
  const float scale = args->inverse_temperature * kLog2E;
  for (int64_t at = 0; at < count; at += kLanes) {
    const Tail<Float32> logits(row + start + at, count - at);
    Float32::put(weights + at, power_of_two((load<Floats>(logits.elements) - max) * scale));
  }
  double total = 0.0, sum = 0.0;
  for (int64_t at = 0; at < count; ++at) total += weights[at];
  int64_t last = 0;
  for (int64_t at = 0; at < count; ++at) {
    sum += weights[at];
    if (weights[at] > 0.0f) last = at;
    if (sum > share * total) return start + at;
  }
  return start + last;
}

void draw_row(const GspoDraw* args, int64_t token, double* sums_B) {
  const float* const row = args->logits_NV + token * args->row_stride;
  const float max = block_max<Float32>(row, args->vocab);
  double total = 0.0;
  int64_t block = 0;
  for (int64_t start = 0; start < args->vocab; start += kDrawn, ++block) {
    const int64_t count = args->vocab - start < kDrawn ? args->vocab - start : kDrawn;
    sums_B[block] = block_sums<Float32, false>(row + start, count, args->inverse_temperature, max).sum_exp;
    total += sums_B[block];
  }
  int64_t chosen = 0;
  if (args->uniforms_N) {
    const double threshold = args->uniforms_N[token] * total;
    double before = 0.0, own_before = 0.0;
    int64_t own = 0;  // the last block with a share, where rounding leaves none beyond the threshold
    for (int64_t each = 0; each < block; before += sums_B[each++]) {
      if (sums_B[each] > 0.0) own = each, own_before = before;
      if (before + sums_B[each] > threshold) break;
    }
    const double share = (threshold - own_before) / sums_B[own];
    chosen = column_of(args, row, own * kDrawn, max, share < 1.0 ? share : nextafter(1.0, 0.0));
  } else {
    while (chosen + 1 < args->vocab && row[chosen] != max) ++chosen;
  }
  args->tokens_N[token] = chosen;
  args->log_probs_N[token] = (float)((row[chosen] - max) * args->inverse_temperature - log(total));
}

void draw(const GspoDraw* args, int64_t first, int64_t last) {
  double* const sums = (double*)malloc(sizeof(double) * (args->vocab / kDrawn + 1));
  for (int64_t token = first; token < last; ++token) draw_row(args, token, sums);
  free(sums);
}

}  // namespace
