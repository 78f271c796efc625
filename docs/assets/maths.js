// Formulas, by KaTeX; again on each page that Material loads without a new document.
document$.subscribe(() => {
  for (const formula of document.querySelectorAll(".arithmatex:not(:has(.katex))")) {
    const tex = formula.textContent.slice(2, -2); // without \( \) or \[ \]
    katex.render(tex, formula, { displayMode: formula.tagName === "DIV", throwOnError: false });
  }
});
