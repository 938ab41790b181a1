for(const box of document.querySelectorAll('.viewer')){
 const data=JSON.parse(box.querySelector('script').textContent),maps=box.querySelector('.maps'),tabs=box.querySelector('.tabs'),
  slider=box.querySelector('input'),output=box.querySelector('output'),button=box.querySelector('.controls button');
 let current=0,timer=null;
 const number=v=>Math.abs(v)>=1000||v===0?v.toFixed(0):Number(v.toPrecision(3)).toString().replace('-','\u2212');
 const build=()=>{maps.innerHTML='';for(const p of data.variables[current].panels){const f=document.createElement('figure');
  f.innerHTML='<figcaption></figcaption><div class="map" style="aspect-ratio:'+data.aspect+'"><img alt=""><svg viewBox="0 0 100 '+100/data.aspect+
   '"></svg><div class="note"></div></div><div class="scale"><span>'+number(p.low)+'</span><i style="background:'+p.gradient+'"></i><span>'+number(p.high)+'</span></div>';
  f.querySelector('figcaption').textContent=p.title;f.querySelector('img').alt=p.title;maps.append(f)}show()};
 const show=()=>{const k=+slider.value;output.textContent=data.labels[k];data.variables[current].panels.forEach((p,i)=>{const f=maps.children[i];
  const img=f.querySelector('img'),frame=p.frames?p.frames[Math.min(k,p.frames.length-1)]:null;if(frame)img.src=frame;img.style.display=frame?'':'none';
  const dots=p.points?p.points[k]:[];f.querySelector('svg').innerHTML=dots.map(d=>'<circle cx="'+d[0]+'" cy="'+d[1]+'" r="'+p.radius+'" '+
   (d[2]?'style="fill:'+d[2]+';stroke:#0006;stroke-width:.2"':'style="fill:none;stroke:var(--soft);stroke-width:.35"')+'/>').join('');
  f.querySelector('.note').textContent=p.points&&!dots.length?'no observation':(p.note||'')})};
 data.variables.forEach((v,i)=>{const b=document.createElement('button');b.textContent=v.label;b.onclick=()=>{current=i;
  [...tabs.children].forEach((t,j)=>t.className=i===j?'on':'');build()};b.className=i?'':'on';tabs.append(b)});
 slider.max=data.labels.length-1;slider.value=data.start||0;slider.oninput=show;
 if(data.labels.length<2)box.querySelector('.controls').style.display='none';
 button.onclick=()=>{if(timer){clearInterval(timer);timer=null;button.textContent='Play'}else{button.textContent='Pause';
  timer=setInterval(()=>{slider.value=(+slider.value+1)%data.labels.length;show()},350)}};
 build()}
