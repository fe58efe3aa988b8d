// RMSNorm and rotary embedding, for the file that has the vectors: included by token_kernels.h.
//
// A row is a head or a token of `width` adjacent elements; it is read once, computed in float32 and rounded once.

GSPO_INLINE int64_t part_of(int64_t column, int64_t width) { return width - column < kLanes ? width - column : kLanes; }

// `count` elements, zeros behind them.
template <typename Type>
GSPO_INLINE Floats get_part(const typename Type::Element* from, int64_t count) {
  if (count == kLanes) return Type::get(from);
  typename Type::Element elements[kLanes] = {};
  memcpy(elements, from, sizeof(*from) * count);
  return Type::get(elements);
}

template <typename Type>
GSPO_INLINE void put_part(typename Type::Element* to, Floats value, int64_t count) {
  if (count == kLanes) return Type::put(to, value);
  typename Type::Element elements[kLanes];
  Type::put(elements, value);
  memcpy(to, elements, sizeof(*to) * count);
}

template <typename Type>
GSPO_INLINE const typename Type::Element* strided_row(const GspoRows& rows, int64_t row) {
  return (const typename Type::Element*)rows.data + row / rows.heads * rows.token_stride + row % rows.heads * rows.head_stride;
}

template <typename Type>
void norm_of(const GspoRmsNorm* args, int64_t first, int64_t last) {
  const auto* const weight = (const typename Type::Element*)args->weight;
  const int64_t width = args->x.width;
  for (int64_t row = first; row < last; ++row) {
    const auto* const from = strided_row<Type>(args->x, row);
    auto* const to = (typename Type::Element*)args->out + row * width;
    Floats squares = {};
    for (int64_t column = 0; column < width; column += kLanes) {
      const Floats value = get_part<Type>(from + column, part_of(column, width));
      squares += value * value;
    }
    const float scale = 1.0f / sqrtf(sum_of_lanes(squares) / width + args->eps);
    args->scale[row] = scale;
    for (int64_t column = 0; column < width; column += kLanes) {
      const int64_t count = part_of(column, width);
      const Floats value = get_part<Type>(from + column, count) * scale;
      put_part<Type>(to + column, value * get_part<Type>(weight + column, count), count);
    }
  }
}

// dx = scale (g w - x scale^2 mean(g w x)); the weight's gradient, g x scale, summed over the rows.
template <typename Type>
void norm_backward_of(const GspoRmsNormBackward* args, float* grad_weight, int64_t first, int64_t last) {
  const auto* const weight = (const typename Type::Element*)args->weight;
  const int64_t width = args->x.width;
  memset(grad_weight, 0, sizeof(*grad_weight) * width);
  for (int64_t row = first; row < last; ++row) {
    const auto* const from = strided_row<Type>(args->x, row);
    const auto* const grad = strided_row<Type>(args->grad, row);
    auto* const to = (typename Type::Element*)args->grad_x + row * width;
    const float scale = args->scale[row];
    Floats product = {};
    for (int64_t column = 0; column < width; column += kLanes) {
      const int64_t count = part_of(column, width);
      const Floats with_x = get_part<Type>(grad + column, count) * get_part<Type>(from + column, count);
      product += with_x * get_part<Type>(weight + column, count);
      const Floats sum = get_part<Float32>(grad_weight + column, count) + with_x * scale;
      put_part<Float32>(grad_weight + column, sum, count);
    }
    const float mean = sum_of_lanes(product) / width * scale * scale;
    for (int64_t column = 0; column < width; column += kLanes) {
      const int64_t count = part_of(column, width);
      const Floats value = get_part<Type>(grad + column, count) * get_part<Type>(weight + column, count);
      put_part<Type>(to + column, (value - get_part<Type>(from + column, count) * mean) * scale, count);
    }
  }
}

// out = x cos + [-right, left] sin; backward: the transposed turn.
template <typename Type>
void rotary_of(const GspoRotary* args, int64_t first, int64_t last) {
  const int64_t half = args->x.width / 2;
  for (int64_t row = first; row < last; ++row) {
    const auto* const from = strided_row<Type>(args->x, row);
    auto* const to = (typename Type::Element*)args->out + row * args->x.width;
    const int64_t angle = row / args->x.heads * args->x.width;
    const auto* const cos = (const typename Type::Element*)args->cos_TD + angle;
    const auto* const sin = (const typename Type::Element*)args->sin_TD + angle;
    for (int64_t column = 0; column < half; column += kLanes) {
      const int64_t count = part_of(column, half);
      const Floats left = get_part<Type>(from + column, count), right = get_part<Type>(from + half + column, count);
      const Floats sin_left = get_part<Type>(sin + column, count), sin_right = get_part<Type>(sin + half + column, count);
      const Floats new_left = args->backward ? right * sin_right : -(right * sin_left);
      const Floats new_right = args->backward ? -(left * sin_left) : left * sin_right;
      put_part<Type>(to + column, left * get_part<Type>(cos + column, count) + new_left, count);
      put_part<Type>(to + half + column, right * get_part<Type>(cos + half + column, count) + new_right, count);
    }
  }
}

void rms_norm(const GspoRmsNorm* args, int64_t first, int64_t last) {
  if (args->x.element_type == GSPO_FLOAT32) return norm_of<Float32>(args, first, last);
  if (args->x.element_type == GSPO_BFLOAT16) return norm_of<Bfloat16>(args, first, last);
  return norm_of<Float16>(args, first, last);
}

void rms_norm_backward(const GspoRmsNormBackward* args, float* grad_weight, int64_t first, int64_t last) {
  if (args->x.element_type == GSPO_FLOAT32) return norm_backward_of<Float32>(args, grad_weight, first, last);
  if (args->x.element_type == GSPO_BFLOAT16) return norm_backward_of<Bfloat16>(args, grad_weight, first, last);
  return norm_backward_of<Float16>(args, grad_weight, first, last);
}

void rotary(const GspoRotary* args, int64_t first, int64_t last) {
  if (args->x.element_type == GSPO_FLOAT32) return rotary_of<Float32>(args, first, last);
  if (args->x.element_type == GSPO_BFLOAT16) return rotary_of<Bfloat16>(args, first, last);
  return rotary_of<Float16>(args, first, last);
}
