/* js: QuickJS with script files, expressions, and a line-by-line prompt that suits any terminal.
 *
 *   js FILE [ARGUMENTS]     runs a script, or a module if it is one
 *   js -e EXPRESSION        evaluates and prints
 *   js                      reads expressions; std, os are there
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quickjs-libc.h"
#include "quickjs.h"

#include "prompt.h"

static int finish(JSContext *ctx, JSValue value) {
    value = js_std_await(ctx, value);
    int failed = JS_IsException(value);
    if (failed)
        js_std_dump_error(ctx);
    JS_FreeValue(ctx, value);
    return failed;
}

static int run_module(JSContext *ctx, const char *text, size_t length, const char *name) {
    JSValue module = JS_Eval(ctx, text, length, name, JS_EVAL_TYPE_MODULE | JS_EVAL_FLAG_COMPILE_ONLY);
    if (!JS_IsException(module)) {
        if (js_module_set_import_meta(ctx, module, name[0] != '<', 1) < 0) {
            JS_FreeValue(ctx, module);
            js_std_dump_error(ctx);
            return 1;
        }
        module = JS_EvalFunction(ctx, module);
    }
    return finish(ctx, module);
}

static int run_file(JSContext *ctx, const char *path) {
    size_t length;
    char *text = (char *)js_load_file(ctx, &length, path);
    if (!text) {
        perror(path);
        return 1;
    }
    size_t name = strlen(path);
    int failed;
    if ((name > 4 && !strcmp(path + name - 4, ".mjs")) || JS_DetectModule(text, length))
        failed = run_module(ctx, text, length, path);
    else
        failed = finish(ctx, JS_Eval(ctx, text, length, path, JS_EVAL_TYPE_GLOBAL));
    js_free(ctx, text);
    return failed;
}

int main(int argc, char **argv) {
    static const char modules[] =
        "import * as std from 'std'; import * as os from 'os'; globalThis.std = std; globalThis.os = os;";
    int expression = argc > 1 && !strcmp(argv[1], "-e");
    if (argc > 1 && argv[1][0] == '-' && argv[1][1] && (!expression || argc < 3)) {
        fprintf(stderr, "usage: js [FILE [ARGUMENTS] | -e EXPRESSION]\n");
        return 2;
    }
    JSRuntime *rt = JS_NewRuntime();
    if (!rt)
        return 1;
    js_std_init_handlers(rt);
    JSContext *ctx = JS_NewContext(rt);
    if (!ctx)
        return 1;
    js_init_module_std(ctx, "std");
    js_init_module_os(ctx, "os");
    JS_SetModuleLoaderFunc2(rt, NULL, js_module_loader, js_module_check_attributes, NULL);
    js_std_add_helpers(ctx, argc - 1, argv + 1);

    int failed = run_module(ctx, modules, sizeof modules - 1, "<modules>");
    if (expression) {
        JSValue value = JS_Eval(ctx, argv[2], strlen(argv[2]), "<expression>", JS_EVAL_TYPE_GLOBAL);
        value = js_std_await(ctx, value);
        if (JS_IsException(value)) {
            js_std_dump_error(ctx);
            failed = 1;
        } else if (!JS_IsUndefined(value)) {
            const char *text = JS_ToCString(ctx, value);
            if (text)
                puts(text);
            JS_FreeCString(ctx, text);
        }
        JS_FreeValue(ctx, value);
    } else if (argc > 1) {
        failed |= run_file(ctx, argv[1]);
    } else {
        failed |= run_module(ctx, prompt_js, sizeof prompt_js - 1, "<prompt>");
    }
    if (!failed)
        failed = js_std_loop(ctx) != 0;
    js_std_free_handlers(rt);
    JS_FreeContext(ctx);
    JS_FreeRuntime(rt);
    return failed;
}
