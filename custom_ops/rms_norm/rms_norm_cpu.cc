// Norms on the CPU: each row is read from memory once, and then from the cache.
#include "rms_norm/rms_norm_cpu.h"

#include <cmath>

#include "common/parallel.h"
#include "common/vector.h"

namespace oarlock {

// The gradients of scale and bias are summed over the rows of a chunk, then over the chunks: in the same order however
// many threads there are.
static int64_t num_chunks(int64_t rows) {
  const int64_t wanted = rows / 32;
  return wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
}

#if defined(OARLOCK_ISA_PLAIN)
int64_t norm_cpu_workspace(int64_t rows, int64_t cols, bool with_bias) {
  return num_chunks(rows) * cols * (with_bias ? 2 : 1);
}
#endif

namespace OARLOCK_ISA {

constexpr int64_t kGrain = 16 * 1024;                  // elements that are worth a thread
constexpr int64_t kStreamBytes = int64_t{16} << 20;  // outputs from here on would push everything else out of the cache

template <typename T>
static bool streams(const T* p, int64_t rows, int64_t cols) {
  constexpr int64_t vector = kLanes * sizeof(T);
  return rows * cols * int64_t{sizeof(T)} >= kStreamBytes && reinterpret_cast<uintptr_t>(p) % vector == 0 &&
         cols % kLanes == 0;
}

template <typename T>
OARLOCK_INLINE T* row_of(T* base, int64_t row, int64_t cols) {
  return base ? base + row * cols : nullptr;
}

template <typename X, typename W>
static void forward(const NormForward& args) {
  const int64_t cols = args.cols;
  const W *scale = static_cast<const W*>(args.scale), *bias = static_cast<const W*>(args.bias);
  const bool stream = streams(static_cast<const W*>(args.y), args.rows, cols);

  const auto one_row = [&](int64_t row) {
    const X* h = row_of(static_cast<const X*>(args.x), row, cols);
    W* y = row_of(static_cast<W*>(args.y), row, cols);
    Sum values, squares;
    float mean = 0;
    if (args.residual) {
      const X *x = h, *residual = row_of(static_cast<const X*>(args.residual), row, cols);
      X* sum = row_of(static_cast<X*>(args.sum), row, cols);
      for_columns(cols, [&](auto unit, int64_t i) { unit.store(sum + i, unit.load(x + i) + unit.load(residual + i)); });
      h = sum;
    }
    if (bias) {
      for_columns(cols, [&](auto unit, int64_t i) { values.add(unit.load(h + i)); });
      mean = values.total() / float(cols);
      args.mean[row] = mean;
    }
    for_columns(cols, [&](auto unit, int64_t i) {
      const auto centred = unit.load(h + i) - mean;
      squares.add(centred * centred);
    });
    const float invvar = 1.0f / std::sqrt(squares.total() / float(cols) + args.epsilon);
    args.invvar[row] = invvar;
    if (bias) {
      for_columns(cols, [&](auto unit, int64_t i) {
        unit.store(y + i, (unit.load(h + i) - mean) * invvar * unit.load(scale + i) + unit.load(bias + i));
      });
    } else if (stream) {
      for_columns(cols, [&](auto unit, int64_t i) {
        unit.stream(y + i, unit.load(h + i) * invvar * unit.load(scale + i));
      });
    } else {
      for_columns(cols, [&](auto unit, int64_t i) {
        unit.store(y + i, unit.load(h + i) * invvar * unit.load(scale + i));
      });
    }
  };
  parallel_for(args.rows, kGrain / (cols + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) one_row(row);
    if (stream) end_of_stream();
  });
}

// With n = (h - mean) * invvar and g = grad_y * scale:
//   grad_h = invvar * (g - n * mean(g * n) - mean(g)) + grad_sum    (mean(g): LayerNorm only)
//   grad_scale = sum over rows of grad_y * n,  grad_bias = sum over rows of grad_y
template <typename X, typename W>
static void backward(const NormBackward& args) {
  const int64_t rows = args.rows, cols = args.cols, chunks = num_chunks(rows);
  const W* scale = static_cast<const W*>(args.scale);
  const bool centred = args.grad_bias, stream = streams(static_cast<const X*>(args.grad_x), rows, cols);
  float* bias_sums = args.workspace + chunks * cols;

  const auto one_row = [&](int64_t row, float* scale_sum, float* bias_sum) {
    const X* h = row_of(static_cast<const X*>(args.h), row, cols);
    const W* grad_y = row_of(static_cast<const W*>(args.grad_y), row, cols);
    const float invvar = args.invvar[row], mean = centred ? args.mean[row] : 0;
    Sum of_product, of_gradient;
    if (centred) {
      for_columns(cols, [&](auto unit, int64_t i) {
        const auto normed = (unit.load(h + i) - mean) * invvar, g = unit.load(grad_y + i);
        const auto scaled = g * unit.load(scale + i);
        of_gradient.add(scaled);
        of_product.add(scaled * normed);
        unit.store(scale_sum + i, unit.load(scale_sum + i) + g * normed);
        unit.store(bias_sum + i, unit.load(bias_sum + i) + g);
      });
    } else {
      for_columns(cols, [&](auto unit, int64_t i) {
        const auto product = unit.load(grad_y + i) * (unit.load(h + i) * invvar);
        of_product.add(product * unit.load(scale + i));
        unit.store(scale_sum + i, unit.load(scale_sum + i) + product);
      });
    }
    const float product = of_product.total() / float(cols), gradient = of_gradient.total() / float(cols);
    X *grad_x = row_of(static_cast<X*>(args.grad_x), row, cols);
    const auto gradient_at = [&](auto unit, int64_t i) {
      const auto normed = (unit.load(h + i) - mean) * invvar;
      return (unit.load(grad_y + i) * unit.load(scale + i) - normed * product - gradient) * invvar;
    };
    if (args.grad_residual || args.grad_sum) {
      X* grad_residual = row_of(static_cast<X*>(args.grad_residual), row, cols);
      const X* grad_sum = row_of(static_cast<const X*>(args.grad_sum), row, cols);
      for_columns(cols, [&](auto unit, int64_t i) {
        auto value = gradient_at(unit, i);
        if (grad_sum) value += unit.load(grad_sum + i);
        unit.store(grad_x + i, value);
        if (grad_residual) unit.store(grad_residual + i, value);
      });
    } else if (stream) {
      for_columns(cols, [&](auto unit, int64_t i) { unit.stream(grad_x + i, gradient_at(unit, i)); });
    } else {
      for_columns(cols, [&](auto unit, int64_t i) { unit.store(grad_x + i, gradient_at(unit, i)); });
    }
  };
  parallel_for(chunks, chunks * kGrain / (rows * cols + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float *scale_sum = args.workspace + chunk * cols, *bias_sum = bias_sums + chunk * cols;
      for (int64_t i = 0; i < cols; ++i) scale_sum[i] = 0;
      for (int64_t i = 0; centred && i < cols; ++i) bias_sum[i] = 0;
      for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; ++row)
        one_row(row, scale_sum, bias_sum);
    }
    if (stream) end_of_stream();
  });

  const auto add_chunks = [&](const float* sums, W* total) {
    for_columns(cols, [&](auto unit, int64_t i) {
      auto value = unit.load(sums + i);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) value += unit.load(sums + chunk * cols + i);
      unit.store(total + i, value);
    });
  };
  add_chunks(args.workspace, static_cast<W*>(args.grad_scale));
  if (centred) add_chunks(bias_sums, static_cast<W*>(args.grad_bias));
}

template <typename X, typename Run>
static void with_scale_type(DType scale_type, const Run& run) {
  switch (scale_type) {
    case DType::kFloat32: return run(X{}, float{});
    case DType::kFloat16: return run(X{}, Float16{});
    case DType::kBFloat16: return run(X{}, BFloat16{});
  }
}

// run(X{}, W{}) for the types of x and scale.
template <typename Run>
static void with_types(DType x_type, DType scale_type, const Run& run) {
  switch (x_type) {
    case DType::kFloat32: return with_scale_type<float>(scale_type, run);
    case DType::kFloat16: return with_scale_type<Float16>(scale_type, run);
    case DType::kBFloat16: return with_scale_type<BFloat16>(scale_type, run);
  }
}

void norm_forward_cpu(const NormForward& args) {
  with_types(args.x_type, args.scale_type, [&](auto x, auto w) { forward<decltype(x), decltype(w)>(args); });
}

void norm_backward_cpu(const NormBackward& args) {
  with_types(args.x_type, args.scale_type, [&](auto x, auto w) { backward<decltype(x), decltype(w)>(args); });
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(norm_forward_cpu, NormForward)
OARLOCK_ENTRY(norm_backward_cpu, NormBackward)
