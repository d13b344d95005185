"""What each built-in name does, with an example: for `flowlang std NAME`, and for advice where a call does not fit.

The examples read `x` and `y`: R[T = 4, D = 6], an image `im`: R[C = 4, H = 8, W = 8], a matrix `M`: R[D', D], whole numbers `k`: Int(0..4)[T = 4],
and a truth value `c`: Bool[T = 4], or stand
where the tests put them, which compile them all.
"""

from __future__ import annotations


def example(name: str) -> str:
    """Advice on how a built-in name is called."""
    return f"as in `{FORMS[name][0]}`"


FORMS: dict[str, tuple[str, str]] = {
    # Of each entry.
    "abs": ("abs(x)", "the absolute value"),
    "sign": ("sign(x)", "-1, 0 or 1"),
    "exp": ("exp(x)", "the exponential"),
    "expm1": ("expm1(x)", "exp(x) - 1, exact near 0"),
    "log": ("log(abs(x) + 1)", "the natural logarithm, of positive values"),
    "log1p": ("log1p(abs(x))", "log(1 + x), exact near 0"),
    "sqrt": ("sqrt(x ^ 2 + 1)", "the square root, of values from 0 on"),
    "square": ("square(x)", "x ^ 2"),
    "reciprocal": ("reciprocal(exp(x))", "1 / x, of values that are not 0"),
    "sin": ("sin(x)", "the sine"),
    "cos": ("cos(x)", "the cosine"),
    "tan": ("tan(tanh(x))", "the tangent, between -π/2 and π/2"),
    "atan": ("atan(x)", "the inverse tangent"),
    "sinh": ("sinh(x)", "the hyperbolic sine"),
    "cosh": ("cosh(x)", "the hyperbolic cosine"),
    "tanh": ("tanh(x)", "the hyperbolic tangent"),
    "asinh": ("asinh(x)", "the inverse hyperbolic sine"),
    "atanh": ("atanh(tanh(x))", "the inverse hyperbolic tangent, of values in (-1, 1)"),
    "erf": ("erf(x)", "the error function"),
    "erfinv": ("erfinv(tanh(x))", "the inverse error function, of values in (-1, 1)"),
    "sigmoid": ("sigmoid(x)", "1 / (1 + exp(-x))"),
    "logit": ("logit(sigmoid(x))", "the inverse of `sigmoid`, of values in (0, 1)"),
    "softplus": ("softplus(x)", "log(1 + exp(x))"),
    "softplus_inverse": ("softplus_inverse(softplus(x))", "the inverse of `softplus`, of positive values"),
    "relu": ("relu(x)", "max(x, 0)"),
    "leaky_relu": ("leaky_relu(x, 0.1)", "x where it is positive, else the slope (0.01 unless given) times x"),
    "elu": ("elu(x, 1.0)", "x where it is positive, else alpha * (exp(x) - 1)"),
    "selu": ("selu(x)", "the scaled `elu` of self-normalising networks"),
    "gelu": ("gelu(x)", "x times the normal distribution function of x"),
    "silu": ("silu(x)", "x * sigmoid(x)"),
    "floor": ("floor(x)", "the largest whole number that is not above"),
    "round": ("round(x)", "the nearest whole number, halves to the even one"),
    "clamp": ("clamp(x, -1, 1)", "x kept between two bounds"),
    "mod": ("mod(x, 2)", "the rest of a division, with the divisor's sign"),
    "rotate": ("rotate(π * tanh(x), 0.5)", "an angle turned by another, kept in [-π, π)"),
    "where": ("where(x > 0, x, y)", "one value where the condition holds, the other elsewhere; all are evaluated"),
    "min": ("min[D](x)", "the least along axes; `min(a, b)` is the lesser of two values, entry by entry"),
    "max": ("max[D](x)", "the greatest along axes; `max(a, b)` is the greater of two values, entry by entry"),
    # Along axes.
    "sum": ("sum[D](x * y)", "the sum along axes, of all axes without brackets; a sum of a product is a contraction"),
    "mean": ("mean[T, D](x)", "the mean along axes, of all axes without brackets; `B` is the batch, in nets and norms"),
    "var": ("var[D](x, ddof = 1)", "the variance along axes"),
    "std": ("std[D](x)", "the standard deviation along axes"),
    "prod": ("prod[D](x)", "the product along axes"),
    "logsumexp": ("logsumexp[D](x)", "the logarithm of the sum of exponentials"),
    "argmax": ("argmax[D](x)", "the index of the greatest entry"),
    "any": ("any[T](c)", "whether some entry is true"),
    "all": ("all[T](c)", "whether every entry is true"),
    "length": ("length[D](x)", "the Euclidean norm along axes"),
    "normalize": ("normalize[D](x)", "a value over its Euclidean norm"),
    "softmax": ("softmax[D](x)", "positive weights along an axis that sum to 1; `causal = \"T\"` leaves out what comes later"),
    "log_softmax": ("log_softmax[D](x)", "the logarithm of `softmax`"),
    "cumsum": ("cumsum[T](x)", "running sums; `exclusive = true` leaves an entry's own value out, `reverse = true` starts at the end"),
    "sort": ("sort[D](x)", "entries in rising order"),
    "paired": ("x0 ~ normal; paired[B](x0, x)", "the batch's x, each beside the y that makes the sum of squared distances least"),
    # Structure.
    "halves": ("a, b = halves[D](x); join[D](b, a)", "two parts along an axis, the first the larger where the size is odd"),
    "join": ("join[D](x, y)", "values one after the other along an axis"),
    "stack": ("stack[K](x, y)", "values of one type along a new axis"),
    "reverse": ("reverse[D](x)", "the entries along an axis in reverse order"),
    "shift": ("shift[T](x, 1)", "x[t - 1] at t, zeros before"),
    "permute": ("permute[D](x, seed = 3)", "a fixed order along an axis, given as a list or drawn once"),
    "rearrange": ("rearrange[D -> (D, r = 2), r -> R](x)", "as brackets on a value, for a chain of steps"),
    "elementwise": ("elementwise(sinh)", "a step that maps every coordinate alike"),
    "pad": ("pad[H, W](im, 1, border = reflect)", "entries before and after; `[2, 0]` tells them apart"),
    "resize": ("resize[H = 4, W = 4](im, method = linear)", "an image in new sizes"),
    "zeros": ("z: R[T, D, K] = x + zeros[K = 3]; z", "zeros along the axes named"),
    "ones": ("z: R[T, D, K] = x * ones[K = 3]; z", "ones along the axes named"),
    "index": ("index[D](x) * x", "0, 1, 2, ... along an axis of a value"),
    "checker": ("checker[D](x) * x", "1, 0, 1, ... along an axis of a value"),
    "onehot": ("onehot[K = 4](k)", "1 where the index along K is the whole number, 0 elsewhere"),
    "size": ("size([1, 2, 3]) * x", "the length of a list, or the count of a value's entries"),
    "present": ("if present(c) { x } else { y }", "whether an optional value is there, known while compiling"),
    # Matrices.
    "det": ("det[D', D](M)", "the determinant of matrices along two axes of one size"),
    "matrix_exp": ("matrix_exp[D', D](M)", "the exponential of symmetric matrices"),
    "matrix_log": ("matrix_log[D', D](M, floor = 1e-6)", "the logarithm of symmetric matrices; smaller eigenvalues count as `floor`"),
    "matrix_power": ("matrix_power[D', D](M, 0.5, floor = 1e-6)", "a power of symmetric matrices; smaller eigenvalues count as `floor`"),
    # Splines: raw parameters along one axis.
    "rqs": ("rqs[K](x, zeros[K = 8], zeros[K = 8], zeros[K = 7], bound = 5)", "a rational-quadratic spline of each entry, the identity beyond the bound"),
    "rqs_circular": ("rqs_circular[K](π * tanh(x), zeros[K = 8], zeros[K = 8], zeros[K = 8])", "a rational-quadratic spline of an angle"),
    "linear_spline": ("linear_spline[K](sigmoid(x), zeros[K = 8])", "a piecewise linear map of (0, 1)"),
    "quadratic_spline": ("quadratic_spline[K](sigmoid(x), zeros[K = 8], zeros[K = 9])", "a piecewise quadratic map of (0, 1)"),
    "cubic_spline": ("cubic_spline[K](x, zeros[K = 8], zeros[K = 8], zeros[E = 2], bound = 5)", "a piecewise cubic map"),
    # Networks.
    "linear": ("linear[D -> E = 4](x)", "a linear map of one axis, with an offset unless `bias = false`; it takes a `start` and a `weight`"),
    "autoregressive_mlp": ("autoregressive_mlp[D](x, [16, 16])", "a masked network: result i reads entries before i"),
    "conv": ("conv[C, H, W](im, 16, kernel = 3)", "a convolution: the channels' axis and one to three others, then how many channels come out; it takes `stride`, `padding`, `dilation`, `groups`, `bias`, `start` and `weight`"),
    "conv_transpose": ("conv_transpose[C, H, W](im, 16, kernel = 2, stride = 2)", "a transposed convolution: size n becomes n * stride"),
    "max_pool": ("max_pool[H, W](im, 2)", "the greatest entry of each window; it moves by the window unless `stride` is given"),
    "avg_pool": ("avg_pool[H, W](im, 2)", "the mean of each window; it moves by the window unless `stride` is given"),
    # Training.
    "stop": ("stop(x)", "the value, without its gradient"),
    "surrogate": ("surrogate(value = x, gradient = tanh(x))", "the one's value with the other's gradient"),
    "running": ("x - running(mean[B](x), 0.1)", "a statistic of the batch while training, its running mean after"),
    "first_batch": ("param g: R[D] = first_batch(1 / std[B, T](x), 1); x * g", "a start that the first batch gives, and what holds before it"),
    "lipschitz": ("z: R[D] = lipschitz(mlp(16), 0.9)(x[T = 0]); z", "a network with weights scaled so that its certified constant is at most c"),
    "induced": ("param W: R[E = 4, D] ~ normal; sum[D](induced[D](W, 0.9, 2, 2) * x)", "a weight scaled so that its norm from lp over D to lq is at most c"),
    "frozen": ("f = linear[D -> D]; frozen(f)(x)", "a network whose weights get no gradient here"),
    "copy": ("teacher = copy(v); a: R[D] = v(x); b: R[D] = teacher(x); mean((a - b) ^ 2)", "a network with another's weights as they start, from then on its own"),
    "ema": ("slow = ema(v, 0.999); a: R[D] = v(x); b: R[D] = slow(x); mean((a - b) ^ 2)", "a network with the moving average of another's weights"),
    # Derivatives.
    "grad": ("f = linear[D -> E = 1]; def g(x) { sum(f(x)) }; grad(g)(x)", "the gradient of a function with one number for each sample"),
    "jvp": ("f = linear[D -> D]; jvp(f)(x, y)", "the derivative of a function in a direction"),
    "vjp": ("f = linear[D -> D]; vjp(f)(x, y)", "a covector times the Jacobian"),
    "jacobian": ("def g(x) { x ^ 2 }; jacobian(g)(x[T = 0])", "all derivatives of a function: its result has a primed axis more"),
    "divergence": ("def g(x) { x ^ 2 }; divergence(g)(x[T = 0])", "the trace of the Jacobian"),
    "derivative": ("def along(t) { sin(t) * x }; t ~ uniform(0, 1); derivative(along)(t)", "the derivative of a function of one number, as of a path in t"),
    # Maps and solvers.
    "inverse": ("inverse(affine_coupling(net = mlp(16)))", "a bijector the other way round"),
    "integrate": ("integrate(mlp(8, act = tanh), x[T = 0], t = 0 -> 1, rk4(steps = 4))", "the end of a trajectory of dx/dt = v(x, t)"),
    "residual_log_det": ("def log_det(x) -> estimate { residual_log_det(g, x, law = poisson, rate = 2) }", "log|det(I + dg/dx)| of a contraction by its power series"),
    # Distributions.
    "normal": ("z: R[D] ~ normal(0, 1); x + z", "the normal distribution, of a mean and a standard deviation"),
    "multivariate_normal": ("param L: LowerTriangular[D', D]; base multivariate_normal(scale_tril = L)", "the normal distribution with a full covariance, by its Cholesky factor"),
    "uniform": ("z: R[D] ~ uniform(0, 1); x + z", "the uniform distribution on an interval"),
    "uniform_sphere": ("base uniform_sphere", "the uniform distribution on a sphere"),
    "student_t": ("z: R[D] ~ student_t(df = 4); x + z", "Student's distribution, with heavy tails"),
    "laplace": ("z: R[D] ~ laplace(0, 1); x + z", "the Laplace distribution"),
    "logistic": ("z: R[D] ~ logistic(0, 1); x + z", "the logistic distribution"),
    "exponential": ("z: R[D] ~ exponential(rate = 1); x + z", "the exponential distribution"),
    "von_mises": ("z: R[D] ~ von_mises(mean = 0, concentration = 1); x + z", "the normal distribution's like on the circle"),
    "bernoulli": ("z: R[D] ~ bernoulli(logits = x[T = 0]); x + z", "0 or 1"),
    "categorical": ("z ~ categorical[D](logits = x); z", "whole numbers below an axis's size"),
    "mixture": ("z ~ mixture[K](logits = zeros[K = 4], normal(mean = im[C -> K, H = 0, W = 0], scale = 1)); z", "several distributions, one of them drawn by its weight: they lie along an axis"),
    # Starts of parameters.
    **{
        f"{name}_{law}": (f"param W: R[E = 4, D] ~ {name}_{law}(gain = 1); sum[D](W * x)", f"a start: {what}, {law}")
        for name, what in (
            ("kaiming", "variance 2 / inputs (He et al. 2015)"),
            ("lecun", "variance 1 / inputs (LeCun et al. 1998)"),
            ("xavier", "variance 2 / (inputs + outputs) (Glorot and Bengio 2010)"),
        )
        for law in ("normal", "uniform")
    },
    "orthogonal": ("param W: R[E = 4, D] ~ orthogonal; sum[D](W * x)", "a start: rows or columns at right angles (Saxe et al. 2014)"),
    # Constants.
    "true": ("c == true", "a truth value"),
    "false": ("c == false", "a truth value"),
    "none": ("if present(none) { x } else { y }", "an absent value, for an optional place: `weight: net? = none`"),
    "inf": ("where(x > inf, x, y)", "infinity"),
    "π": ("x * π", "3.14159..."),
    "pi": ("x * pi", "3.14159..., also `π`"),
}  # fmt: skip
