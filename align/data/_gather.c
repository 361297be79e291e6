/* Copy rows out of several chunks as fast as whole blocks are copied, which NumPy's `take` does not reach.
 *
 * A row is 2 or 4 kB and the next one lies elsewhere. The hardware prefetches within a row only, so the next row is
 * prefetched explicitly. A batch is many times larger than the cache, so rows are written with non-temporal stores:
 * ordinary stores would read each cache line of the batch before writing it.
 *
 * Only the stable ABI is used: one build serves CPython 3.11 and later.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#ifdef __GNUC__
#define PREFETCH(place) __builtin_prefetch(place)
#else
#define PREFETCH(place) ((void)(place))
#endif

enum { LINE = 64 }; /* bytes of a cache line */

static void
copy_row(char *to, const char *from, Py_ssize_t size)
{
#ifdef __SSE2__
    if ((uintptr_t)to % sizeof(__m128i) == 0 && size % LINE == 0) {
        for (Py_ssize_t at = 0; at < size; at += LINE) {
            const __m128i *source = (const __m128i *)(from + at);
            __m128i *target = (__m128i *)(to + at);
            __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
            __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
            _mm_stream_si128(target, a);
            _mm_stream_si128(target + 1, b);
            _mm_stream_si128(target + 2, c);
            _mm_stream_si128(target + 3, d);
        }
        return;
    }
#endif
    memcpy(to, from, (size_t)size);
}

static void
copy_rows(char *to, const Py_buffer *chunks, const int64_t *of, const int64_t *rows, Py_ssize_t count, Py_ssize_t size)
{
    for (Py_ssize_t n = 0; n < count; n++) {
        if (n + 1 < count) {
            const char *next = (const char *)chunks[of[n + 1]].buf + rows[n + 1] * size;
            for (Py_ssize_t at = 0; at < size; at += LINE)
                PREFETCH(next + at);
        }
        copy_row(to + n * size, (const char *)chunks[of[n]].buf + rows[n] * size, size);
    }
#ifdef __SSE2__
    _mm_sfence(); /* complete the stores before another thread learns that the batch is ready */
#endif
}

/* Return the position of the first row that is outside its chunk, or `count` if there is none. */
static Py_ssize_t
first_outside(const Py_buffer *chunks, Py_ssize_t chunk_count, const int64_t *of, const int64_t *rows, Py_ssize_t count,
              Py_ssize_t size)
{
    Py_ssize_t n = 0;
    while (n < count && of[n] >= 0 && of[n] < chunk_count && rows[n] >= 0 && rows[n] < chunks[of[n]].len / size)
        n++;
    return n;
}

static PyObject *
gather(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *chunks, *result = NULL;
    Py_buffer of, rows, target;
    if (!PyArg_ParseTuple(arguments, "O!y*y*w*:gather", &PyTuple_Type, &chunks, &of, &rows, &target))
        return NULL;
    Py_ssize_t count = rows.len / (Py_ssize_t)sizeof(int64_t), chunk_count = PyTuple_Size(chunks), viewed = 0;
    Py_buffer *views = PyMem_New(Py_buffer, chunk_count);
    if (views == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    while (viewed < chunk_count && !PyObject_GetBuffer(PyTuple_GetItem(chunks, viewed), views + viewed, PyBUF_SIMPLE))
        viewed++;
    if (viewed < chunk_count)
        goto done;
    if (count == 0 || of.len != rows.len || target.len % count != 0 || target.len == 0) {
        PyErr_Format(PyExc_ValueError, "the target has %zd bytes, which do not hold %zd rows", target.len, count);
        goto done;
    }
    Py_ssize_t size = target.len / count, outside = first_outside(views, chunk_count, of.buf, rows.buf, count, size);
    if (outside < count) {
        PyErr_Format(PyExc_IndexError, "row %zd of %zd is outside its chunk", outside, count);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    copy_rows(target.buf, views, of.buf, rows.buf, count, size);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    while (viewed)
        PyBuffer_Release(views + --viewed);
    PyMem_Free(views);
    PyBuffer_Release(&of);
    PyBuffer_Release(&rows);
    PyBuffer_Release(&target);
    return result;
}

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS, "gather(chunks, of, rows, target): copy row rows[n] of chunks[of[n]] to target[n]."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_gather", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC
PyInit__gather(void)
{
    return PyModuleDef_Init(&module);
}
